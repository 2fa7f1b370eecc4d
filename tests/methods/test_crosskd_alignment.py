"""CrossKD: a student's channels get the teacher's mean and deviation."""

from types import SimpleNamespace

import pytest
import torch
from crosskd_cases import array, distilled, relative_error, small_pair

from d2kd.layers import channel_statistics, transfer_statistics
from d2kd.methods.crosskd import MAX_GAIN, align_statistics

TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def test_alignment_equals_the_original():
    student = array("align/stu").requires_grad_()
    aligned = align_statistics(student, array("align/tea"))
    assert torch.allclose(aligned, array("align/out"), **TIGHT)
    (aligned * array("align/cotangent"))[:, :3].sum().backward()
    assert torch.allclose(student.grad, array("align/grad_stu_ch0to2"), **TIGHT)


def test_aligned_features_have_the_teachers_statistics():
    torch.manual_seed(0)
    student, teacher = 3 + 2 * torch.randn(2, 5, 4, 6), -1 + 0.5 * torch.randn(3, 5, 7, 2)
    aligned = align_statistics(student, teacher)
    for ours, theirs in zip(torch.std_mean(aligned, (0, 2, 3)), torch.std_mean(teacher, (0, 2, 3))):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(align_statistics(5 + 3 * student, teacher), aligned, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 3, 2), (1, 2, 1, 1), (2, 2, 1, 1), (1, 3, 4, 1)])
def test_gradient_of_the_alignment(shape):
    torch.manual_seed(0)
    student = torch.randn(shape, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: align_statistics(x, teacher), student)


@pytest.mark.parametrize("max_gain", [float("inf"), 0.5])
def test_alignment_with_its_relu(max_gain):
    torch.manual_seed(0)
    student = torch.randn(2, 3, 5, 4, requires_grad=True)
    moments = channel_statistics(torch.randn(2, 3, 5, 4))
    plain = transfer_statistics(student, *moments, max_gain).relu()
    fused = transfer_statistics(student, *moments, max_gain, relu=True)
    assert torch.equal(fused, plain) and (plain == 0).any()
    cotangent = torch.randn_like(plain)
    ours, expected = (torch.autograd.grad(x, student, cotangent)[0] for x in (fused, plain))
    assert torch.equal(ours, expected) and ours.abs().sum() > 0


@pytest.mark.parametrize("deviation", [0.0, 1e-12, 1e-7, 1e-6, 1e-3])
def test_an_almost_dead_channel_has_a_bounded_gradient(deviation):
    torch.manual_seed(0)
    teacher = torch.randn(2, 1, 8, 8)
    student = (0.3 + deviation * torch.randn(2, 1, 8, 8)).requires_grad_()
    aligned = transfer_statistics(student, *channel_statistics(teacher), max_gain=MAX_GAIN)
    aligned.backward(torch.randn_like(aligned))
    assert torch.isfinite(aligned).all()
    assert student.grad.norm() < 20 * MAX_GAIN


def test_the_method_bounds_it():
    distiller = distilled("gfl", *small_pair("gfl")).distillers["CrossKD"]
    torch.manual_seed(0)
    dead = (0.3 + 1e-7 * torch.randn(2, 32, 8, 8)).requires_grad_()
    statistics = [channel_statistics(torch.randn(2, 32, 8, 8))]
    student = SimpleNamespace(tower=lambda _: [dead])
    teacher = SimpleNamespace(tower_statistics=lambda _: statistics)
    (aligned,) = distiller.hand_over("cls", student, teacher)
    aligned.backward(torch.randn_like(aligned))
    assert dead.grad.abs().max() < 20 * MAX_GAIN


def test_a_nearly_constant_channel_gets_the_deviation_of_the_teacher():
    torch.manual_seed(0)
    student, teacher = 0.3 + 1e-4 * torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    aligned = align_statistics(student, teacher)
    assert (aligned.std() / teacher.std()).item() == pytest.approx(1, abs=0.02)


def test_alignment_of_half_precision_is_computed_in_float32():
    student, teacher = 60 + torch.randn(2, 1, 64, 64), torch.randn(2, 1, 64, 64)
    aligned = align_statistics(student.half().requires_grad_(), teacher.half())
    assert aligned.dtype == torch.float32
    assert relative_error(aligned, align_statistics(student.half().float(), teacher)) < 1e-3

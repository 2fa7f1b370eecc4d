"""HGD (our reading of the abstract): the formulas by value and gradient, and their invariants."""

import numpy as np
import pytest
import torch

from d2kd.layers import valid_cells
from d2kd.methods.hgd import element_weights, stage_weights, weighted_distance
from d2kd.methods.hgd.distances import DISTANCES, LEAST_VARIANCE, squared_scale
from d2kd.methods.hgd.weights import micro_weights

TEACHER = torch.tensor([[3.0, 1, 0], [1, 0, 1]]).reshape(1, 2, 1, 3)
STUDENT = torch.tensor([[2.0, 1, 1], [0, 0, 1]]).reshape(1, 2, 1, 3)
EVERYWHERE = torch.ones(1, 1, 3, dtype=torch.bool)


def stage_loss(
    student, teacher, valid, powers=(1, 1), max_weight=10.0, distance="l2", norm="energy"
):
    """One stage on its own, as in the first step."""
    position, channel = micro_weights(teacher, valid, *powers)
    scale = squared_scale(teacher, valid, norm)
    values = weighted_distance(student, teacher, position, channel, scale, distance, max_weight)
    return (values / DISTANCES[distance].divisor(scale)).mean()


def padded(x, rows, columns, value=7.0):
    return torch.nn.functional.pad(x, (0, columns, 0, rows), value=value)


def random_case(seed=0):
    """Two images of different size on a map of 6 x 8 with 5 channels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 5, 6, 8, generator=generator) * 3
    valid = valid_cells([(48, 64), (35, 21)], (6, 8), 8, "cpu")
    return student, teacher, valid


@pytest.mark.parametrize(
    "powers, expected", [((0, 0), 0.25), ((1, 0), 0.375), ((0, 1), 5 / 18), ((1, 1), 7 / 18)]
)
def test_micro_weights_of_the_hand_computed_case(powers, expected):
    assert stage_loss(STUDENT, TEACHER, EVERYWHERE, powers).item() == pytest.approx(expected)
    weights = element_weights(TEACHER, EVERYWHERE, *powers, 10.0)
    loss = (weights * (STUDENT - TEACHER) ** 2).mean() / 2
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "power, expected, loss",
    [
        (-1, [0.4, 0.6, 1.2, 1.8], 0.36),
        (0, [1, 1, 1, 1], 0.5),
        (0.5, [1.396038, 1.139860, 0.806003, 0.658099], 0.578443),
        (1, [1.8, 1.2, 0.6, 0.4], 0.65),
    ],
)
def test_macro_weights_of_the_hand_computed_case(power, expected, loss):
    gaps = torch.tensor([0.9, 0.6, 0.3, 0.2], requires_grad=True)
    weights = stage_weights(gaps, power)
    assert weights.tolist() == pytest.approx(expected, rel=1e-5) and not weights.requires_grad
    assert (weights * gaps).mean().item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("power", [-2, -1, 1, 2])
def test_macro_weights_are_bounded_and_have_mean_one(power):
    for gaps in ([0.0, 0.0, 0.0], [0.0, 1.0, 1e6], [1e-9, 1.0, 2.0]):
        weights = stage_weights(torch.tensor(gaps), power)
        assert weights.mean().item() == pytest.approx(1) and weights.max() / weights.min() <= 16.01


@pytest.mark.parametrize("powers", [(0, 0), (1, 0), (0.5, 2), (2, 1)])
@pytest.mark.parametrize("max_weight", [1.5, 10.0])
def test_element_weights_equal_a_naive_loop(powers, max_weight):
    _, teacher, valid = random_case()
    weights = element_weights(teacher, valid, *powers, max_weight)
    for n in range(2):
        t, on = np.abs(teacher[n].double().numpy()), valid[n].numpy()
        p, q = t.mean(0), np.array([channel[on].mean() for channel in t])
        p = (p / p[on].mean()) ** powers[0]
        q = (q / q.mean()) ** powers[1]
        w = np.minimum(p / p[on].mean() * (q / q.mean())[:, None, None], max_weight)
        w /= np.mean([channel[on].mean() for channel in w])
        assert np.allclose(weights[n].numpy()[:, on], w[:, on], rtol=1e-5)
        assert (weights[n].numpy()[:, ~on] == 0).all()
        assert weights[n][:, valid[n]].mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("norm", ["energy", "channel_std", "none"])
def test_a_stage_equals_a_naive_mean(distance, norm):
    student, teacher, valid = random_case()
    weights = element_weights(teacher, valid, 1, 1, 3.0)
    scale = squared_scale(teacher, valid, norm)[:, None, None]
    root = scale.sqrt()
    s, t = student / root, teacher / root
    error = {
        "l2": (s - t) ** 2,
        "l1": (s - t).abs(),
        "smooth_l1": torch.nn.functional.smooth_l1_loss(s, t, reduction="none"),
        "partial_l2": torch.where((s <= t) & (t <= 0), torch.zeros(()), (s - t) ** 2),
        "cosine": 1 - torch.cosine_similarity(student, teacher, dim=1)[:, None].expand_as(s),
    }[distance]
    expected = np.mean([(weights * error)[n][:, valid[n]].mean().item() for n in range(2)])
    loss = stage_loss(student, teacher, valid, (1, 1), 3.0, distance, norm)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_goes_to_the_student_alone():
    student, teacher, valid = random_case()
    student.requires_grad_(), teacher.requires_grad_()
    weights = element_weights(teacher, valid, 1, 1, 3.0)
    assert not weights.requires_grad
    stage_loss(student, teacher.detach(), valid, max_weight=3.0).backward()
    scale = squared_scale(teacher, valid)
    count = 2 * 5 * valid.sum((1, 2))[:, None, None, None]
    expected = 2 * weights * (student - teacher) / scale / count
    assert torch.allclose(student.grad, expected.detach(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("norm", ["energy", "channel_std", "none"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_padding_does_not_matter(distance, norm):
    student, teacher, valid = random_case()
    options = {"distance": distance, "norm": norm}
    expected = stage_loss(student, teacher, valid, **options)
    wider = valid_cells([(48, 64), (35, 21)], (9, 10), 8, "cpu")
    loss = stage_loss(padded(student, 3, 2), padded(teacher, 3, 2, 50.0), wider, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_scale_of_a_stage_does_not_matter(distance):
    student, teacher, valid = random_case()
    expected = stage_loss(student, teacher, valid, distance=distance).item()
    for factor in (1e-3, 1e3):
        loss = stage_loss(factor * student, factor * teacher, valid, distance=distance)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_dead_channel_has_the_least_variance():
    _, teacher, _ = random_case()
    teacher[:, 0] = 0
    scale = squared_scale(teacher, torch.ones(2, 6, 8), "channel_std")
    expected = LEAST_VARIANCE * scale[1:].sum().item() / len(scale)
    assert scale[0].item() == pytest.approx(expected, rel=1e-4)


def test_dead_maps_are_finite():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    for distance in DISTANCES:
        loss = stage_loss(student, torch.zeros(2, 3, 4, 4), valid, distance=distance)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    assert torch.equal(element_weights(student, valid, 1, 1, 10.0), torch.ones(2, 3, 4, 4))


def test_sums_are_float32_under_autocast():
    student, teacher, valid = random_case()
    expected = stage_loss(student.bfloat16().float(), teacher.bfloat16().float(), valid)
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage_loss(student.bfloat16(), teacher.bfloat16(), valid)
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=1e-4)


def test_valid_cells_have_their_centre_in_the_image():
    valid = valid_cells([(12, 9), (8, 32), (3, 3)], (2, 4), 8, "cpu")
    assert valid[0].tolist() == [[True, False, False, False], [False] * 4]
    assert valid[1].tolist() == [[True] * 4, [False] * 4]
    assert valid[2].sum() == 1  # smaller than half a cell
    assert valid_cells([(13, 13)], (2, 4), 8, "cpu").sum() == 4

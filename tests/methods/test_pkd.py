"""PKD: its loss by value and gradient, and its adapters."""

import math
from types import SimpleNamespace

import pytest
import torch
from crosskd_cases import array
from toys import batch, distill_config, step

from d2kd.distillation import build_model
from d2kd.layers import MAX_GAIN
from d2kd.methods.pkd import pearson_imitation, standardize


def test_equals_the_original():
    loss = pearson_imitation(array("pkd/stu"), array("pkd/tea"))
    assert torch.allclose(loss, array("pkd/loss_lw1"), rtol=1e-9)


def test_is_one_minus_the_correlation():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8)
    flat_s, flat_t = (x.transpose(0, 1).flatten(1) for x in (student, teacher))
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(flat_s, flat_t)]
    expected = (1 - torch.stack(correlations).mean()) * (191 / 192)  # unbiased deviations
    assert pearson_imitation(student, teacher).item() == pytest.approx(expected.item(), rel=1e-4)


def test_neither_scale_nor_shift_of_a_channel_matters():
    student, teacher = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    scale, shift = torch.rand(4, 1, 1) + 0.5, torch.randn(4, 1, 1)
    loss = pearson_imitation(student, teacher)
    assert torch.allclose(pearson_imitation(scale * student + shift, teacher), loss, atol=1e-5)
    assert pearson_imitation(teacher, scale * teacher + shift) < 1e-5


@pytest.mark.parametrize("shape", [(2, 3, 3, 2), (1, 2, 1, 1)])
def test_gradient(shape):
    student = torch.randn(shape, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: pearson_imitation(x, teacher), student)


def test_a_constant_channel_is_zero():
    assert standardize(torch.full((2, 3, 4, 4), 5.0)).abs().max() == 0


def test_the_gradient_of_an_almost_constant_channel_is_bounded():
    dead = torch.full((2, 64, 16, 16), 3.0) + 1e-6 * torch.randn(2, 64, 16, 16)
    dead.requires_grad_()
    live = torch.randn(dead.shape)

    def norm_of(max_gain):
        return torch.autograd.grad(pearson_imitation(dead, live, max_gain), dead)[0].norm()

    assert norm_of(MAX_GAIN) < 10 < 100 < norm_of(math.inf)


def test_the_method_bounds_it(tmp_path):
    model = build_model(distill_config(tmp_path, "FCOS", methods=("PKD",)))
    names = [level.name for level in model.family.levels]
    torch.manual_seed(0)
    dead = {x: (3 + 1e-6 * torch.randn(2, 64, 16, 16)).requires_grad_() for x in names}
    live = {x: torch.randn(2, 64, 16, 16) for x in names}
    views = (SimpleNamespace(features=maps) for maps in (dead, live))
    model.distillers["PKD"](*views, [])["feature"].sum().backward()
    assert all(x.grad.norm() < 10 for x in dead.values())


def test_an_adapter_is_trained_where_the_widths_differ(tmp_path):
    opts = ["MODEL.FPN.OUT_CHANNELS", 96]
    model = build_model(distill_config(tmp_path, "FCOS", teacher_opts=opts, methods=("PKD",)))
    adapters = model.distillers["PKD"].adapters
    step(model, batch())["loss_pkd_feature"].backward()
    assert model.last_terms["PKD", "feature"].shape == (len(adapters),) == (5,)
    assert all(a.weight.shape == (96, 64, 1, 1) and a.bias.shape == (96,) for a in adapters)
    assert all(a.weight.grad.norm() > 0 for a in adapters)


def test_no_adapter_between_equal_widths(tmp_path):
    model = build_model(distill_config(tmp_path, "FCOS", methods=("PKD",)))
    assert not list(model.distillers["PKD"].parameters())

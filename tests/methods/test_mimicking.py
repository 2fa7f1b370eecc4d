"""Prediction mimicking: CrossKD's losses between the two heads' own predictions."""

from types import SimpleNamespace

import pytest
import torch
from crosskd_cases import WEIGHTS, distilled, original_batch, relative_error, small_pair
from crosskd_formulas import cross_losses
from torch.nn import functional as F
from toys import step

from d2kd.layers import box_distribution_kl, quality_focal_kd
from d2kd.views.families import DensePredictions


def terms(losses):
    return {k.split("_")[-1]: v for k, v in losses.items() if "mimicking" in k}


@pytest.mark.parametrize("objects", [True, False], ids=["objects", "no objects"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_equals_the_formulas_written_out(name, objects):
    student, teacher = small_pair(name)
    batch = original_batch(objects)
    losses = terms(step(distilled(name, student, teacher, method="Mimicking"), batch))
    expected = cross_losses(name, student, teacher, batch, depth=0, cross=False)
    expected = {term: weight * expected[term] for term, weight in WEIGHTS[name].items()}
    assert losses.keys() == expected.keys()
    for term in losses:
        assert losses[term].item() == pytest.approx(expected[term].item(), rel=1e-5), term
    levels = list(student.backbone.levels)
    ours = torch.autograd.grad(sum(losses.values()), levels)
    for a, b in zip(ours, torch.autograd.grad(sum(expected.values()), levels)):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_reaches_the_whole_head(name):
    student, teacher = small_pair(name)
    model = distilled(name, student, teacher, method="Mimicking")
    sum(terms(step(model, original_batch())).values()).backward()
    idle = [n for n, p in student.head.named_parameters() if p.grad is None]
    assert all("ctrness" in n for n in idle) and bool(idle) == (name == "fcos")


def test_exponent_and_temperature_reach_the_losses():
    opts = ["BETA", 2.0, "TEMPERATURE", 3.0]
    distiller = distilled("gfl", *small_pair("gfl"), opts, "Mimicking").distillers["Mimicking"]
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 1, 5, 3, 4)
    expected = quality_focal_kd(ours, theirs, beta=2.0).sum(dim=1).flatten(1)
    assert torch.allclose(distiller.class_loss([ours], [theirs]), expected)
    ours, theirs = torch.randn(2, 1, 68, 3, 4)
    teacher = SimpleNamespace(predictions=DensePredictions(deltas=[theirs]))
    expected = box_distribution_kl(ours, theirs, num_anchors=1, temperature=3.0).flatten(1)
    assert torch.allclose(distiller.box_loss([ours], None, teacher), expected)


def test_centerness_of_half_precision_is_compared_in_float32():
    distiller = distilled("atss", *small_pair("atss"), method="Mimicking").distillers["Mimicking"]
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 1, 1, 3, 4).half()
    expected = F.binary_cross_entropy_with_logits(
        ours.float(), theirs.float().sigmoid(), reduction="none"
    )
    assert torch.equal(distiller.centerness_loss([ours], [theirs]), expected.flatten(1))

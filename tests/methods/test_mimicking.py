"""Prediction mimicking: CrossKD's losses between the two heads' own predictions."""

import pytest
import torch
from crosskd_cases import WEIGHTS, distilled, original_batch, relative_error, small_pair
from crosskd_formulas import cross_losses
from toys import step


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

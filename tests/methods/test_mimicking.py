"""Prediction mimicking: CrossKD's losses between the two heads' own predictions."""

import pytest
import torch
from crosskd_cases import WEIGHTS, distilled, original_batch, relative_error, small_pair
from crosskd_formulas import cross_losses
from toys import step


def terms(losses):
    return {k.split("_")[-1]: v for k, v in losses.items() if "mimicking" in k}


@pytest.mark.parametrize("name", WEIGHTS)
def test_equals_the_formulas_written_out(name):
    student, teacher = small_pair(name)
    batch = original_batch()
    losses = terms(step(distilled(name, student, teacher, method="Mimicking"), batch))
    expected = cross_losses(name, student, teacher, batch, tap=0, cross=False)
    expected = {term: WEIGHTS[name][term] * loss for term, loss in expected.items()}
    assert losses.keys() == expected.keys()
    for term in losses:
        assert losses[term].item() == pytest.approx(expected[term].item(), rel=1e-5), term
    levels = list(student.backbone.levels)
    ours = torch.autograd.grad(sum(losses.values()), levels)
    for a, b in zip(ours, torch.autograd.grad(sum(expected.values()), levels)):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_reaches_the_whole_student_but_not_the_teacher(name):
    student, teacher = small_pair(name)
    model = distilled(name, student, teacher, method="Mimicking")
    sum(terms(step(model, original_batch())).values()).backward()
    idle = [n for n, p in student.head.named_parameters() if p.grad is None]
    assert all("ctrness" in n for n in idle) and bool(idle) == (name == "fcos")
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", WEIGHTS)
def test_finite_without_objects(name):
    model = distilled(name, *small_pair(name), method="Mimicking")
    losses = terms(step(model, original_batch(with_objects=False)))
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) and v < 1e5 for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.student.backbone.levels)

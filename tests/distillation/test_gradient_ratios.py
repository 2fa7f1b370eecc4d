"""Gradient norms at the FPN: by value, and without effect on the step."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from toys import STUDENTS, batch, distill_config, step

from d2kd.distillation import build_model
from d2kd.distillation.balance import gradient_ratios


def test_ratios_of_known_gradients():
    levels = [torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(3, requires_grad=True)]
    detection = 3 * levels[0][0] + 4 * levels[1][1]  # norm 5
    terms = {
        "both": (levels[0] * 5).sum() + 0 * levels[1].sum(),  # norm 5 * sqrt(2)
        "one": 10 * levels[1][0],
        "none": torch.ones((), requires_grad=True) * 7,
        "constant": torch.ones(()),
    }
    ratios = gradient_ratios(detection, terms, levels)
    assert {k: v.item() for k, v in ratios.items()} == pytest.approx(
        {"both": 2**0.5, "one": 2.0, "none": 0.0, "constant": 0.0}
    )


@pytest.mark.parametrize("size", [1e-8, 5.0])
def test_gradients_of_half_precision_neither_vanish_nor_overflow(size):
    level = torch.ones(16, dtype=torch.float16, requires_grad=True)
    loss = size * level.float().sum()
    ratios = gradient_ratios(loss, {"term": 2 * loss}, [level])
    assert ratios["term"].item() == pytest.approx(2, rel=0.05)


def test_ratios_are_finite_where_detection_has_no_gradient():
    level = torch.ones(3, requires_grad=True)
    assert gradient_ratios(0 * level.sum(), {"term": level.sum()}, [level])["term"].isfinite()


def test_without_a_trained_fpn_there_is_nothing_to_compare():
    loss = torch.ones((), requires_grad=True)
    assert gradient_ratios(loss, {"term": loss}, []) == {}
    assert gradient_ratios(loss, {"term": loss}, [torch.ones(3)]) == {}


@pytest.mark.parametrize("student", STUDENTS)
def test_looking_does_not_change_the_step(tmp_path, student):
    found = []
    for period in (1, 10**6):
        torch.manual_seed(0)
        model = build_model(distill_config(tmp_path, student, methods=["PKD"]))
        model.balance_period = period
        with torch.jit.optimized_execution(False):  # as in training
            losses = step(model, batch())
            sum(losses.values()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({**losses, **grads})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_ratios_are_logged_by_period(tmp_path):
    model = build_model(distill_config(tmp_path, "RetinaNet", methods=["PKD"])).train()
    with EventStorage(99) as storage:
        model(batch())
        value, iteration = storage.latest()["distill/pkd_feature/gradient"]
        assert value > 0 and iteration == 99
    with EventStorage(100) as storage:
        model(batch())
        assert "distill/pkd_feature/gradient" not in storage.latest()


def test_a_term_that_stopped_has_no_ratio(tmp_path):
    cfg = distill_config(tmp_path, "RetinaNet", ["DISTILL.FRS.CLS.STOP_ITER", 50])
    model = build_model(cfg).train()
    for iteration in (10, 99):
        with EventStorage(iteration) as storage:
            model(batch())
    assert "distill/frs_feature/gradient" in storage.latest()
    assert "distill/frs_cls/gradient" not in storage.latest()

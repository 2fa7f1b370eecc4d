"""Schedules of term weights."""

import re

import pytest
import torch

from d2kd.errors import UserError
from d2kd.methods.core import TermSchedule, term
from d2kd.schema import check_node, config_node


def test_warmup_is_linear_from_zero():
    schedule = TermSchedule(0.2, max_iter=1000, warmup_iters=500)
    assert schedule(0) == 0
    assert schedule(125) == pytest.approx(0.05)
    assert schedule(500) == schedule(999) == schedule(5000) == 0.2


@pytest.mark.parametrize(
    "decay, values",
    [
        ("constant", [1, 1, 1]),
        ("linear", [1, 0.5, 0.25]),
        ("cosine", [1, 0.5, 0.146447]),
        ("up_down", [1, 4 / 3, 2 / 3]),
    ],
)
def test_decay_over_training(decay, values):
    schedule = TermSchedule(1.0, max_iter=400, decay=decay)
    assert [schedule(i) for i in (0, 200, 300)] == pytest.approx(values, abs=1e-6)


def test_up_down_doubles_at_a_quarter():
    assert TermSchedule(3.0, max_iter=400, decay="up_down")(100) == pytest.approx(6.0)


def test_start_and_stop():
    schedule = TermSchedule(1.0, max_iter=100, warmup_iters=10, start_iter=20, stop_iter=50)
    active = [i for i in range(100) if schedule.active(i)]
    assert active == list(range(20, 50))
    assert [schedule(i) for i in (19, 20, 25, 30, 50)] == [0, 0, 0.5, 1, 0]


def test_weight_zero_is_never_active():
    assert not TermSchedule(0.0, max_iter=10).active(5)


def test_level_weights_scale_each_level():
    value = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    schedule = TermSchedule(0.5, max_iter=10, level_weights=[1.0, 0.0, 3.0])
    result = schedule.apply(value, 5)
    result.backward()
    assert result.item() == 0.5 * (1 + 12)
    assert value.grad.tolist() == [0.5, 0.0, 1.5]
    assert TermSchedule(0.5, max_iter=10).apply(value, 5).item() == 3.5
    assert TermSchedule(0.5, max_iter=10).apply(value.sum(), 5).item() == 3.5


@pytest.mark.parametrize(
    "key, value",
    [("DECAY", "linaer"), ("WEIGHT", -1.0), ("START_ITER", -5), ("STOP_ITER", -1)]
    + [("WARMUP_ITERS", 0.5), ("LEVEL_WEIGHTS", [1.0, -1.0])],
)
def test_bad_values_name_the_key(key, value):
    keys = {"Y": term(1.0)}
    node = config_node(keys)
    node.Y[key] = value
    with pytest.raises(UserError, match=rf"DISTILL.X.Y.{key} is {re.escape(repr(value))}: "):
        check_node(node, keys, "DISTILL.X")


def test_from_config():
    node = config_node(term(2.0, warmup_iters=10))
    node.DECAY = "linear"
    node.LEVEL_WEIGHTS, node.START_ITER, node.STOP_ITER = [1.0, 0.5], 20, 80
    schedule = TermSchedule.from_config(node, max_iter=100)
    assert [schedule(i) for i in (19, 25, 50, 80)] == pytest.approx([0, 0.75, 1, 0])
    assert schedule.apply(torch.tensor([1.0, 2.0]), 50).item() == pytest.approx(2)

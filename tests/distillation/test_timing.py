"""Times of the parts of a step."""

import time

import pytest
import torch

from d2kd.distillation.timing import Stopwatch, mean_seconds


def test_a_part_that_runs_twice_is_summed():
    watch = Stopwatch(torch.device("cpu"))
    slow = watch.part("teacher")(time.sleep)
    slow(0.02)
    with watch.part("teacher"):
        time.sleep(0.02)
    with watch.part("distillation"):
        pass
    seconds = watch.seconds()
    assert set(seconds) == {"teacher", "distillation"}
    assert seconds["teacher"] >= 0.04 > seconds["distillation"]


def test_the_mean_is_over_steps_that_had_the_part():
    one, other = (Stopwatch(torch.device("cpu")) for _ in range(2))
    with one.part("teacher"):
        time.sleep(0.02)
    assert mean_seconds([one, other]) == {"teacher": pytest.approx(one.seconds()["teacher"])}
    assert mean_seconds([]) == {}

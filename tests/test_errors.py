"""Endings of messages about unknown names."""

import pytest

from d2kd.errors import MAX_NAMES, nearest

KEYS = ["SEED", "SOLVER", "SOLVER.BASE_LR", "SOLVER.MAX_ITER", "DISTILL.FRS.CLS", "DISTILL.FRS.P"]


@pytest.mark.parametrize(
    "name, ending",
    [
        ("SEDE", "did you mean 'SEED'?"),
        ("solver.max_iters", "did you mean 'SOLVER.MAX_ITER'?"),
        ("SOLVR.MAX_ITER", "did you mean 'SOLVER.MAX_ITER'?"),
        ("MAX_ITER", "did you mean 'SOLVER.MAX_ITER'?"),
        # That both begin with the same node makes them no more alike
        ("SOLVER.FOO", "known: SOLVER.BASE_LR, SOLVER.MAX_ITER"),
        ("DISTILL.FRS.ALPHA", "known: DISTILL.FRS.CLS, DISTILL.FRS.P"),
    ],
)
def test_the_nearest_name_or_those_beside_it(name, ending):
    assert nearest(name, KEYS) == ending


def test_of_many_names_some_are_shown():
    ending = nearest("zzz", [f"name{i:02}" for i in range(MAX_NAMES + 7)])
    assert ending.startswith("known: name00, name01") and ending.endswith("name19 and 7 more")

"""Runs on another number of processes than the recipe was written for."""

import pytest
from toys import STUDENTS, config

from d2kd.engine.scaling import scale_to_processes

OPTS = ["SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.MAX_ITER", 90000, "SOLVER.IMS_PER_BATCH", 16]
OPTS += ["SOLVER.BASE_LR", 0.02, "DISTILL.FRS.CLS.WARMUP_ITERS", 500]
OPTS += ["DISTILL.FRS.CLS.START_ITER", 1, "DISTILL.FRS.FEATURE.STOP_ITER", 60000]


@pytest.mark.parametrize("frozen", [False, True])
def test_iterations_of_terms_follow_those_of_the_solver(frozen):
    cfg = config(STUDENTS["FCOS"], OPTS)
    if frozen:
        cfg.freeze()
    scaled = scale_to_processes(cfg, 2)
    assert scaled.is_frozen() == frozen
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.IMS_PER_BATCH) == (360000, 4)
    assert pytest.approx(0.005) == scaled.SOLVER.BASE_LR
    frs = scaled.DISTILL.FRS
    assert (frs.CLS.WARMUP_ITERS, frs.CLS.START_ITER) == (2000, 4)
    assert (frs.FEATURE.STOP_ITER, frs.CLS.STOP_ITER) == (240000, 0)
    assert cfg.DISTILL.FRS.CLS.WARMUP_ITERS == 500
    # What was scaled is not scaled again
    assert scale_to_processes(scaled, 2).DISTILL.FRS.CLS.WARMUP_ITERS == 2000


def test_more_processes_leave_no_term_for_ever():
    scaled = scale_to_processes(config(STUDENTS["FCOS"], OPTS), 16)
    assert scaled.DISTILL.FRS.CLS.WARMUP_ITERS == 250
    assert scaled.DISTILL.FRS.CLS.START_ITER == 1


def test_more_processes_leave_no_period_for_never():
    opts = ["SOLVER.MAX_ITER", 1, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 1]
    scaled = scale_to_processes(config(STUDENTS["FCOS"], [*OPTS, *opts]), 64)
    periods = scaled.SOLVER.MAX_ITER, scaled.SOLVER.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD
    assert periods == (1, 1, 1)
    never = config(STUDENTS["FCOS"], [*OPTS, "TEST.EVAL_PERIOD", 0])
    assert scale_to_processes(never, 64).TEST.EVAL_PERIOD == 0


@pytest.mark.parametrize("reference", [0, 4])
def test_nothing_to_scale(reference):
    cfg = config(STUDENTS["FCOS"], ["SOLVER.REFERENCE_WORLD_SIZE", reference])
    assert scale_to_processes(cfg, 4) == cfg

"""Two small runs to report on."""

import pytest
from engine.runs import run_config, train

from d2kd.checkpoint import write_student_yaml
from d2kd.engine.run_config import write_run_config
from d2kd.engine.trained_run import open_run
from d2kd.engine.versions import record_versions


def _finished(cfg):
    train(cfg)
    write_run_config(cfg)
    write_student_yaml(cfg)
    record_versions(cfg.OUTPUT_DIR)
    return open_run(cfg.OUTPUT_DIR)


@pytest.fixture(scope="session")
def distilled(tmp_path_factory, toy_dataset):
    """A run with FRS."""
    return _finished(run_config(tmp_path_factory.mktemp("frs"), "FCOS", toy_dataset, LENGTH))


@pytest.fixture(scope="session")
def plain(tmp_path_factory, toy_dataset):
    """A run without a teacher."""
    folder = tmp_path_factory.mktemp("plain")
    return _finished(run_config(folder, "FCOS", toy_dataset, LENGTH, methods=[]))


# A log of the losses, two evaluations, and a checkpoint before the last
LENGTH = ["SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 10, "TEST.EVAL_PERIOD", 10]
LENGTH += ["SOLVER.IMS_PER_BATCH", 1, "DISTILL.FRS.FEATURE.WARMUP_ITERS", 5]

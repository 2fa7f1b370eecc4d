"""Statistics of BatchNorm that are measured anew before an evaluation are those of the student."""

import torch
from runs import run_config, train

from d2kd.engine import DistillTrainer
from d2kd.engine.hooks import PreciseBN

PRECISE = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3]


def test_measuring_statistics_runs_no_teacher(tmp_path, toy_dataset):
    """6 steps and 3 evaluations are 6 passes of the teacher."""
    passes = []

    def count(trainer):
        model = trainer.bare_model
        model.teacher.family.stage_module.register_forward_hook(lambda *_: passes.append(1))

    cfg = run_config(tmp_path, "FCOS", toy_dataset, PRECISE, methods=["HGD"])
    trainer = train(cfg, at=0, action=count)
    assert len(passes) == 6
    norms = [m for m in trainer.student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.running_var.isfinite().all() for m in norms)


def test_statistics_are_the_same_every_time_and_leave_random_numbers_alone(tmp_path, toy_dataset):
    trainer = DistillTrainer(run_config(tmp_path, "FCOS", toy_dataset, PRECISE))
    [hook] = [hook for hook in trainer._hooks if isinstance(hook, PreciseBN)]
    norm = next(m for m in trainer.student.modules() if isinstance(m, torch.nn.BatchNorm2d))
    trainer.student.train()
    measured, states = [], []
    for _ in range(2):
        states.append(torch.get_rng_state())
        hook.update_stats()
        measured.append(norm.running_mean.clone())
    assert torch.equal(*measured) and torch.equal(*states)

"""Statistics of BatchNorm that are measured anew before an evaluation are those of the student."""

import torch
from runs import run_config, train

PRECISE = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3]


def test_measuring_statistics_runs_no_teacher(tmp_path, toy_dataset):
    """6 steps and 3 evaluations are 6 passes of the teacher."""
    passes = []

    def count(trainer):
        model = trainer.bare_model
        model.teacher.detector.backbone.register_forward_hook(lambda *_: passes.append(1))

    cfg = run_config(tmp_path, "FCOS", toy_dataset, PRECISE, methods=["HGD"])
    trainer = train(cfg, at=0, action=count)
    assert len(passes) == 6
    norms = [m for m in trainer.student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.running_var.isfinite().all() for m in norms)

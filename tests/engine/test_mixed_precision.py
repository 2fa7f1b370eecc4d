"""What mixed precision adds to a run: a factor of the gradients."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import AMPTrainer
from detectron2.utils.events import EventStorage
from runs import run_config, train

from d2kd.distillation import LOG_PERIOD
from d2kd.engine import DistillTrainer
from d2kd.engine.hooks import GradScaleHook
from d2kd.errors import UserError


def steps(found_inf, count):
    """The hook after steps whose gradients are finite or not: what it logs."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([weight], 1.0), torch.amp.GradScaler("cpu")
    hook = GradScaleHook(SimpleNamespace(grad_scaler=scaler))
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(iter=0, storage=storage)
        for i in range(count):
            hook.trainer.iter = i
            weight.grad = torch.full((1,), float("inf") if found_inf else 1.0)
            scaler.scale(torch.zeros(1))
            scaler.step(optimizer)
            scaler.update()
            hook.after_step()
        return storage.history("grad_scale").values()


def test_the_scale_is_logged():
    assert steps(False, LOG_PERIOD) == [(2.0**16, 0)]


def test_a_run_whose_steps_are_all_skipped_ends():
    assert steps(True, LOG_PERIOD)[0][0] == 2.0 ** (16 - LOG_PERIOD)
    with pytest.raises(UserError, match="SOLVER.AMP.ENABLED is True, and of late hardly a step"):
        steps(True, 2 * LOG_PERIOD)


def test_full_precision_has_no_scale():
    GradScaleHook(SimpleNamespace()).after_step()


def test_a_run_in_full_precision_goes_on_in_mixed_precision(tmp_path, toy_dataset):
    cfg = run_config(tmp_path, "FCOS", toy_dataset, ["TEST.EVAL_PERIOD", 0])
    train(cfg)
    trainer = DistillTrainer(cfg)
    trainer._trainer.__class__ = AMPTrainer  # which is made on a GPU alone
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu")
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 6 and trainer._trainer.grad_scaler.get_scale() == 2.0**16

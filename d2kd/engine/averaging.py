"""An exponential moving average (EMA) of the student."""

import logging
from typing import Any, Dict, List

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from timm.utils import ModelEmaV3
from torch import nn

from d2kd.checkpoint import EMA_WEIGHTS, StudentCheckpointer

logger = logging.getLogger(__name__)

# Before the names of its metrics
EMA = "ema"


class EMAHook(HookBase):
    """Lets an average follow the student: average = decay · average + (1 - decay) · student after
    every step, of parameters and of buffers that are floating-point numbers; others are copied.
    Steps that mixed precision skips, because a gradient is not finite, do not count.

    It is part of every checkpoint. At the end of a run it is saved as a student of its own and
    evaluated. Register it before what saves and evaluates the student, whose files in the run's
    folder then are the last.

    Attributes:
        average: a detector like the student, in eval mode.
    """

    def __init__(
        self,
        student: nn.Module,
        decay: float,
        optimizer: torch.optim.Optimizer,
        checkpointer: StudentCheckpointer,
    ):
        """
        Args:
            student: the detector in training; it is copied before anything observes it.
            decay: 0 ... 1.
            optimizer: of the training.
            checkpointer: of the run.
        """
        self._student = student
        self._ema = ModelEmaV3(student, decay=decay)
        self.average: nn.Module = self._ema.module.requires_grad_(False)
        self._checkpointer = checkpointer
        self._resumed = self._stepped = False
        optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # A fused optimizer is called, and skips the step itself, where mixed precision overflows
        overflow = getattr(optimizer, "found_inf", None)
        self._stepped = overflow is None or not overflow.item()

    def state_dict(self) -> Dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.average.load_state_dict(state)
        self._resumed = True

    def before_train(self) -> None:
        if not self._resumed:  # the student has its first weights by now
            self._ema.set(self._student)

    def after_step(self) -> None:
        if self._stepped:
            self._ema.update(self._student)
        self._stepped = False

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:  # it failed, or was stopped
            return
        self._checkpointer.save_ema(self.average, self.trainer.max_iter - 1)
        logger.info(f"Evaluating the student's moving average, {EMA_WEIGHTS}")
        results = flatten_results_dict(self.trainer.test(self.trainer.cfg, self.average))
        metrics = {f"{EMA}/{name}": float(value) for name, value in results.items()}
        self.trainer.storage.put_scalars(**metrics, smoothing_hint=False)


def ema_hook(
    cfg: CfgNode,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpointer: StudentCheckpointer,
) -> List[HookBase]:
    """The :class:`EMAHook` of a run; none without ``SOLVER.EMA_DECAY``."""
    decay = cfg.SOLVER.EMA_DECAY
    return [EMAHook(student, decay, optimizer, checkpointer)] if decay else []

"""Hooks of the trainer; those that average, stop and keep its state have modules of their own."""

import logging
import math
import resource
import sys
from functools import partial
from typing import Callable, Iterable, List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from d2kd.checkpoint import BEST_WEIGHTS, Best, StudentCheckpointer, read_best
from d2kd.distillation import LOG_PERIOD, TeacherStudent
from d2kd.distillation.timing import mean_seconds
from d2kd.errors import UserError, nearest
from d2kd.layers.random import preserve_rng_state
from d2kd.methods.core import scalar_name

from .results import METRICS

logger = logging.getLogger(__name__)

# It starts at 2^16, and healthy runs stay above 1
_SMALLEST_SCALE = 2.0**-20
# How the names of Detectron2's metrics of detection end
_MEASURED = tuple(f"/{metric}" for metric in METRICS)


class ScheduleHook(HookBase):
    """Announces when a loss term starts and stops, and logs the weight of every term and its
    value per FPN level, as ``distill/<method>_<term>/...``."""

    def __init__(self, model: TeacherStudent):
        self._model = model
        self._active = None

    def before_step(self) -> None:
        iteration = self.trainer.iter
        active = {key for key, s in self._model.schedules.items() if s.active(iteration)}
        if active != self._active:
            names = ", ".join(sorted("_".join(key).lower() for key in active)) or "none"
            logger.info(f"Distillation terms from iteration {iteration} on: {names}")
            self._active = active

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if (iteration + 1) % LOG_PERIOD:  # reading values from the device costs time
            return
        storage = self.trainer.storage
        for (method, term), schedule in self._model.schedules.items():
            name = partial(scalar_name, method, term)
            storage.put_scalar(name("weight"), schedule(iteration), smoothing_hint=False)
            value = self._model.last_terms.get((method, term))
            if value is not None and value.dim() == 1:
                for level, number in enumerate(value.tolist()):
                    storage.put_scalar(name(f"level{level}"), number)


class PreciseBN(hooks.PreciseBN):
    """Detectron2's, but every time with the same batches and without a trace in the random numbers
    of training, so that a resumed run comes to what one that went on does."""

    def update_stats(self) -> None:
        self._data_iter = None  # begin anew
        with preserve_rng_state():
            super().update_stats()


def precise_bn_hook(
    cfg: CfgNode, student: nn.Module, build_loader: Callable[[CfgNode], Iterable]
) -> List[HookBase]:
    """The :class:`PreciseBN` of a run, which measures with the student alone; none if it is not
    enabled, or the student has no such norms."""
    if not cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(student):
        return []
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0  # as Detectron2's, which saves memory and time
    test = cfg.TEST
    return [PreciseBN(test.EVAL_PERIOD, student, build_loader(cfg), test.PRECISE_BN.NUM_ITER)]


class BestHook(HookBase):
    """Keeps the student of the best evaluation as ``model_best.pth``. Register it after the
    evaluation, on the main process.

    What the best one was stands in its file, not in the state of the run: a run that was killed
    goes on from an earlier checkpoint, and must not take a worse one for the best.
    """

    def __init__(self, checkpointer: StudentCheckpointer, metric: str, test_sets: Sequence[str]):
        """
        Args:
            checkpointer: of the run.
            metric: the name of a scalar in the storage, the higher the better.
            test_sets: ``DATASETS.TEST``, on which it is measured.
        """
        self._test_sets = list(test_sets)
        self._checkpointer = checkpointer
        self._metric = metric
        self._best: Optional[Best] = None
        self._warned = False

    def before_train(self) -> None:
        best = read_best(self._checkpointer.save_dir)
        if best is not None and best.metric != self._metric:
            logger.warning(
                f"The best student so far was chosen by {best.metric}, RUN.BEST_METRIC is "
                f"{self._metric}: the next evaluation replaces it"
            )
        elif best is not None and best.test_sets and best.test_sets != self._test_sets:
            logger.warning(
                f"The best student so far was chosen on {', '.join(best.test_sets)}, DATASETS.TEST "
                f"is {', '.join(self._test_sets)}: the next evaluation replaces it"
            )
        else:
            self._best = best

    def after_step(self) -> None:
        self._look()

    def after_train(self) -> None:
        self._look()

    def _look(self) -> None:
        latest = self.trainer.storage.latest()
        value, iteration = latest.get(self._metric, (math.nan, -1))
        if iteration != self.trainer.iter:
            self._warn_of_other_metrics(
                [n for n, (_, i) in latest.items() if i == self.trainer.iter]
            )
            return
        if math.isfinite(value) and (self._best is None or value > self._best.value):
            best = Best(self._metric, value, iteration, self._test_sets)
            self._checkpointer.save_best(best)
            self._best = best
            logger.info(f"The best so far: {self._metric} {value:.2f}, kept as {BEST_WEIGHTS}")

    def _warn_of_other_metrics(self, names: List[str]) -> None:
        """Once, if an evaluation in this step measured something else."""
        measured = [name for name in names if name.endswith(_MEASURED)]
        if measured and not self._warned:
            self._warned = True
            logger.warning(
                f"RUN.BEST_METRIC is '{self._metric}', which evaluations do not measure, so that "
                f"no best student is kept: {nearest(self._metric, measured)}"
            )


def best_hook(cfg: CfgNode, checkpointer: StudentCheckpointer) -> List[HookBase]:
    """The :class:`BestHook` of a run. None where there is one evaluation only, and so nothing to
    choose from, and in all processes but the main one."""
    metric, sets = cfg.RUN.BEST_METRIC, cfg.DATASETS.TEST
    if not metric or not cfg.TEST.EVAL_PERIOD or not comm.is_main_process():
        return []
    if len(sets) > 1 and not metric.startswith(tuple(f"{name}/" for name in sets)):
        metric = f"{sets[0]}/{metric}"  # as evaluations of several sets log it
    return [BestHook(checkpointer, metric, sets)]


class CostHook(HookBase):
    """Logs what a step costs: ``max_memory``, the most so far in MiB, of the GPU where one is used,
    else of the process; and as ``teacher_time`` and ``distillation_time`` the seconds of a step
    that go to the teacher and to the distillation losses, both without the backward pass."""

    def __init__(self, model: nn.Module, batches: int = 1):
        """
        Args:
            model: the model in training.
            batches: passes of the model in a step.
        """
        self._model = model
        self._batches = batches

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % LOG_PERIOD:
            return
        storage = self.trainer.storage
        storage.put_scalar("max_memory", max_memory(), smoothing_hint=False)
        times = getattr(self._model, "step_times", None)  # a plain detector has none
        for part, seconds in mean_seconds(times or ()).items():
            storage.put_scalar(f"{part}_time", seconds * self._batches, smoothing_hint=False)
        if times:
            times.clear()


class GradScaleHook(HookBase):
    """In mixed precision, logs ``grad_scale``, by which gradients are multiplied. A step with one
    that is not finite halves it and trains nothing; a run in which nearly all are like that stops,
    for its losses are finite, and nobody else would notice."""

    def __init__(self, trainer: SimpleTrainer):
        """
        Args:
            trainer: Detectron2's, of single steps; one in full precision has no scale.
        """
        self._scaler = getattr(trainer, "grad_scaler", None)

    def after_step(self) -> None:
        """
        Raises:
            UserError: if the scale has fallen so low that gradients would vanish.
        """
        if self._scaler is None or (self.trainer.iter + 1) % LOG_PERIOD:
            return
        scale = self._scaler.get_scale()
        self.trainer.storage.put_scalar("grad_scale", scale, smoothing_hint=False)
        if scale < _SMALLEST_SCALE:
            raise UserError(
                "SOLVER.AMP.ENABLED is True, and of late hardly a step had finite gradients, so "
                "that nothing was trained: lower SOLVER.BASE_LR or the terms' WEIGHT, or set it to "
                "False to see which loss is the cause"
            )


def max_memory() -> float:
    """The most memory that this process has used so far, in MiB: of the GPU if it uses one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

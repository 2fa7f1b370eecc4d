"""The state of a run that Detectron2 does not save, so that a resumed run ends as one that was
never interrupted: random generators, the moving loss normaliser of dense detectors, metrics that
are not written yet, which teacher it had, and what the optimizer's state belongs to."""

import random
from typing import Any, Dict, List, Mapping

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from d2kd.errors import UserError, reason
from d2kd.layers import RandomStream

from .metrics import Scalars, recent_scalars


class RunState(HookBase):
    """A hook that gathers the state of every rank before a checkpoint is written, and a
    checkpointable that saves and restores it. Register it just before the checkpointer.

    Attributes:
        scalars: the metrics that a checkpoint came with.
        saved_teacher: checksum of the teacher that a checkpoint was written with, "" without one.
        teacher: that of this run's.
    """

    def __init__(
        self,
        student: nn.Module,
        period: int,
        streams: Mapping[str, RandomStream],
        teacher: str = "",
    ):
        """
        Args:
            student: the detector whose loss normaliser is kept.
            period: of checkpoints, in iterations.
            streams: random numbers that are drawn beside the student's, by name.
            teacher: checksum of the teacher.
        """
        self._student = student
        self._streams = dict(streams)
        self._period = period
        self._ranks: List[Dict] = []
        self.scalars: Scalars = {}
        self.teacher = self.saved_teacher = teacher

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if iteration % self._period == 0 or iteration == self.trainer.max_iter:
            self.gather()

    def gather(self) -> None:
        """Takes the state of every rank; all of them have to call it."""
        self._ranks = comm.all_gather(self._capture())

    def state_dict(self) -> Dict[str, Any]:
        return {
            "ranks": self._ranks,
            "scalars": recent_scalars(self.trainer.storage),
            "teacher": self.teacher,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._ranks = state["ranks"]
        self.scalars = state.get("scalars", {})
        self.saved_teacher = state.get("teacher", self.teacher)

    def restore(self) -> None:
        """Puts this rank's saved state in force; nothing where another number of ranks saved it.

        Raises:
            UserError: if it is not what d2kd writes.
        """
        if len(self._ranks) != comm.get_world_size():
            return
        try:
            self._restore(self._ranks[comm.get_rank()])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            raise UserError(
                f"the checkpoint to resume has random states that d2kd does not write ({reason(e)})"
                ": write the name of another one into last_checkpoint, or train anew"
            ) from e

    def _restore(self, state: Dict[str, Any]) -> None:
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        for name, stream in self._streams.items():
            if name in state["streams"]:  # a method may be new in a run that was told to go on
                stream.load_state_dict(state["streams"][name])
        if state["loss_normalizer"] is not None:
            self._student.loss_normalizer = state["loss_normalizer"]

    def _capture(self) -> Dict[str, Any]:
        # Plain numbers and tensors only: torch.load(weights_only=True) reads the file
        version, keys, gauss = random.getstate()
        name, np_keys, *rest = np.random.get_state()
        return {
            "python": (version, list(keys), gauss),
            "numpy": (name, np_keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            "streams": {name: stream.state_dict() for name, stream in self._streams.items()},
            "loss_normalizer": getattr(self._student, "loss_normalizer", None),
        }


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> List[str]:
    """The model's names of what an optimizer trains, in its order: its state goes by position."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]

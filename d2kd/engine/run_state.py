"""The state of a run that Detectron2 does not save, so that a resumed run ends as one that was
never interrupted: random generators, and the moving loss normaliser of dense detectors."""

import random
from typing import Any, Dict, List

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn


class RunState(HookBase):
    """A hook that gathers the state of every rank before a checkpoint is written, and a
    checkpointable that saves and restores it. Register it before the checkpointer."""

    def __init__(self, student: nn.Module, period: int):
        """
        Args:
            student: the detector whose loss normaliser is kept.
            period: of checkpoints, in iterations.
        """
        self._student = student
        self._period = period
        self._ranks: List[Dict] = []

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if iteration % self._period == 0 or iteration == self.trainer.max_iter:
            self._ranks = comm.all_gather(self._capture())

    def state_dict(self) -> Dict[str, Any]:
        return {"ranks": self._ranks}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._ranks = state["ranks"]

    def restore(self) -> None:
        """Puts this rank's saved state in force; nothing where another number of ranks saved it."""
        if len(self._ranks) != comm.get_world_size():
            return
        state = self._ranks[comm.get_rank()]
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])
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
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "loss_normalizer": getattr(self._student, "loss_normalizer", None),
        }

"""How the weight of a loss term goes over training."""

from typing import Dict, Sequence

import torch
from detectron2.config import CfgNode
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch import Tensor

from d2kd.schema import Key, Keys

# Factor on WEIGHT over the progress of training, which goes from 0 to 1.
DECAYS: Dict[str, ParamScheduler] = {
    "constant": ConstantParamScheduler(1.0),
    "linear": LinearParamScheduler(1.0, 0.0),
    "cosine": CosineParamScheduler(1.0, 0.0),
    # DeFeat's third variant: up to twice the weight in the first quarter, then down to 0
    "up_down": CompositeParamScheduler(
        [LinearParamScheduler(1.0, 2.0), LinearParamScheduler(2.0, 0.0)],
        lengths=[0.25, 0.75],
        interval_scaling=["rescaled", "rescaled"],
    ),
}


def term(weight: float, help: str = "", warmup_iters: int = 0) -> Keys:
    """The config keys that every loss term has.

    Args:
        weight: default of ``WEIGHT``. 0 switches the term off: it is neither built nor computed.
        help: what the term is, and where the weight comes from.
        warmup_iters: default of ``WARMUP_ITERS``.
    """
    return {
        "WEIGHT": Key(float(weight), help, low=0),
        "LEVEL_WEIGHTS": Key(
            [], "One factor per FPN level, finest first; empty = 1 for each", low=0, item=float
        ),
        "WARMUP_ITERS": Key(
            warmup_iters,
            "The weight grows linearly from 0 over this many iterations, counted from START_ITER",
            low=0,
        ),
        "DECAY": Key(
            "constant",
            "constant, linear or cosine (to 0 at the end of training), up_down (to 2x at a "
            "quarter, then to 0)",
            choices=tuple(DECAYS),
        ),
        "START_ITER": Key(0, "The first iteration with the term", low=0),
        "STOP_ITER": Key(0, "The first iteration without it; 0 = never", low=0),
    }


class TermSchedule:
    """The weight of one loss term at every iteration, and its factor on every FPN level."""

    def __init__(
        self,
        weight: float,
        *,
        max_iter: int,
        level_weights: Sequence[float] = (),
        warmup_iters: int = 0,
        decay: str = "constant",
        start_iter: int = 0,
        stop_iter: int = 0,
    ):
        """
        Args:
            weight: the full weight.
            max_iter: length of training, in iterations.
            level_weights: one factor per level, or nothing for 1 everywhere.
            warmup_iters: length of the linear warm-up that begins at ``start_iter``.
            decay: one of :data:`DECAYS`.
            start_iter: first iteration with the term.
            stop_iter: first iteration without it; 0 = never.
        """
        self.weight = weight
        self.level_weights = tuple(level_weights)
        self.max_iter = max(max_iter, 1)
        self.start_iter = start_iter
        self.stop_iter = stop_iter or float("inf")
        self._decay = DECAYS[decay]
        self._warmup_iters = warmup_iters

    @classmethod
    def from_config(cls, node: CfgNode, max_iter: int) -> "TermSchedule":
        """
        Args:
            node: with the keys of :func:`term`, checked.
            max_iter: length of training, in iterations.
        """
        return cls(max_iter=max_iter, **{k.lower(): v for k, v in node.items()})

    def active(self, iteration: int) -> bool:
        """Whether the term has to be computed at this iteration."""
        return self.weight != 0 and self.start_iter <= iteration < self.stop_iter

    def __call__(self, iteration: int) -> float:
        """The weight at an iteration (0-based); 0 where the term is not active."""
        if not self.active(iteration):
            return 0.0
        weight = self.weight * self._decay(min(iteration, self.max_iter - 1) / self.max_iter)
        since_start = iteration - self.start_iter
        if since_start < self._warmup_iters:
            weight *= since_start / self._warmup_iters
        return weight

    def apply(self, value: Tensor, iteration: int) -> Tensor:
        """
        Args:
            value: what the distiller returned: one value per level, shape (L,), or a scalar.
            iteration: 0-based.

        Returns:
            the weighted term, a scalar.
        """
        if value.dim() == 1:
            if self.level_weights:
                value = value * torch.tensor(self.level_weights, dtype=value.dtype).to(
                    value.device, non_blocking=True
                )
            value = value.sum()
        return value * self(iteration)

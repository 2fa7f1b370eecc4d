"""Distances between feature maps, per element, and the scale that they are measured in.

Shapes: N images, C channels, (h, w) the size of a map.
"""

from typing import Callable, Dict, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from d2kd.layers import as_float

NORMS = ("energy", "channel_std", "none")
# A channel that hardly moves counts as one with this share of the mean variance ("channel_std").
LEAST_VARIANCE = 0.01


class Distance(NamedTuple):
    """A distance of feature maps.

    Attributes:
        between: (student, teacher, beta) -> distance of every element, (N, C, h, w), or of every
            position, (N, 1, h, w). Both maps are (N, C, h, w) float32. The beta, (1, 1, 1) or
            (C, 1, 1), is where "smooth_l1" becomes linear.
        degree: the distance grows with this power of the scale of maps (and beta).
    """

    between: Callable[[Tensor, Tensor, Tensor], Tensor]
    degree: int

    def divisor(self, square: Tensor) -> Tensor:
        """What makes the distance of maps with this mean square free of their scale."""
        return square.clamp(min=1e-12).pow(self.degree / 2)


def _l2(student: Tensor, teacher: Tensor, beta: Tensor) -> Tensor:
    return F.mse_loss(student, teacher, reduction="none")


def _l1(student: Tensor, teacher: Tensor, beta: Tensor) -> Tensor:
    return F.l1_loss(student, teacher, reduction="none")


def _smooth_l1(student: Tensor, teacher: Tensor, beta: Tensor) -> Tensor:
    error = (student - teacher).abs()
    small = torch.minimum(error, beta)
    return small * (error - small / 2)


def _partial_l2(student: Tensor, teacher: Tensor, beta: Tensor) -> Tensor:
    both_off = (student <= teacher) & (teacher <= 0)
    return _l2(student, teacher, beta).masked_fill(both_off, 0.0)


def _cosine(student: Tensor, teacher: Tensor, beta: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=1)[:, None]


DISTANCES: Dict[str, Distance] = {
    "l2": Distance(_l2, 2),
    "l1": Distance(_l1, 1),
    "smooth_l1": Distance(_smooth_l1, 2),
    "partial_l2": Distance(_partial_l2, 2),  # no error where student <= teacher <= 0
    "cosine": Distance(_cosine, 0),
}


@torch.no_grad()
def squared_scale(teacher: Tensor, valid: Tensor, norm: str = "energy") -> Tensor:
    """What squared errors of a stage are divided by, from one batch.

    Args:
        teacher: (N, C, h, w).
        valid: (N, h, w).
        norm: one of :data:`NORMS`.

    Returns:
        (1,) mean square of valid elements ("energy") or 1 ("none"); (C,) variances ("channel_std").
    """
    if norm == "none":
        return torch.ones(1, device=teacher.device)
    masked = as_float(teacher) * valid[:, None]
    count = valid.sum().clamp(min=1)
    square = masked.square().sum((0, 2, 3)) / count
    if norm == "energy":
        return square.mean(0, keepdim=True)
    variance = (square - (masked.sum((0, 2, 3)) / count).square()).clamp(min=0)
    return variance.clamp(min=LEAST_VARIANCE * variance.mean())

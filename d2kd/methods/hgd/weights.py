"""The weights of HGD (our reading of its abstract), and the loss that they weight. Formulas:
docs/methods/hgd.md.

Shapes: N images, C channels of the teacher, (h, w) the size of a stage, K stages.
"""

from typing import NamedTuple, Tuple

import torch
from torch import Tensor

from d2kd.layers import as_float

from .distances import DISTANCES

# Only keeps 0 / 0 away: far below any activation, far above float32's smallest number.
TINY = 1e-30


def power_weights(strength: Tensor, power: float, valid: Tensor) -> Tensor:
    """``(a / mean a)^power`` over its own mean, with means over valid elements of each row.

    Args:
        strength: a, (N, ...), at least 0.
        power: 0 gives 1 everywhere.
        valid: same shape, 1 or 0.

    Returns:
        same shape, with mean 1 per row; 0 where not valid.
    """
    dims = tuple(range(1, strength.dim()))
    count = valid.sum(dims, keepdim=True).clamp(min=1)
    strength = (strength + TINY) * valid
    mean = strength.sum(dims, keepdim=True) / count
    weights = (strength / mean.clamp(min=TINY)).pow(power) * valid
    return weights / (weights.sum(dims, keepdim=True) / count).clamp(min=TINY)


@torch.no_grad()
def micro_weights(
    teacher: Tensor, valid: Tensor, spatial_power: float, channel_power: float
) -> Tuple[Tensor, Tensor]:
    """Weights of positions and of channels by how strongly the teacher responds there.

    Args:
        teacher: (N, C, h, w).
        valid: (N, h, w).
        spatial_power, channel_power: β_s and β_c; 0 = all 1.

    Returns:
        (N, h, w), 0 in the padding, and (N, C), each with mean 1 per image.
    """
    valid = valid.float()
    strength = as_float(teacher).abs().mul_(valid[:, None])
    channel = strength.sum((2, 3)) / valid.sum((1, 2)).clamp(min=1)[:, None]
    position = power_weights(strength.mean(1), spatial_power, valid)
    return position, power_weights(channel, channel_power, torch.ones_like(channel))


def clipped_product(position: Tensor, channel: Tensor, max_weight: float) -> Tensor:
    """(N, h, w) and (N, C) -> (N, C, h, w), at most ``max_weight``."""
    return (position[:, None] * channel[..., None, None]).clamp_(max=max_weight)


def with_mean_one(weights: Tensor, valid: Tensor) -> Tensor:
    """Weights (N, C, h, w) over their mean over valid elements (N, h, w), per image."""
    count = weights.shape[1] * valid.sum((1, 2))
    mean = weights.sum((1, 2, 3)) / count.clamp(min=1)
    return weights / mean.clamp(min=TINY)[:, None, None, None]


def element_weights(
    teacher: Tensor, valid: Tensor, spatial_power: float, channel_power: float, max_weight: float
) -> Tensor:
    """The micro weights of every element, docs/methods/hgd.md. The loss itself never keeps them:
    see :func:`weighted_distance`.

    Args:
        teacher: (N, C, h, w).
        valid: (N, h, w), where the images are.
        spatial_power, channel_power: β_s and β_c.
        max_weight: highest product of position and channel weight, before the mean becomes 1.

    Returns:
        (N, C, h, w), with mean 1 per image over valid elements; 0 elsewhere; no gradient.
    """
    position, channel = micro_weights(teacher, valid, spatial_power, channel_power)
    return with_mean_one(clipped_product(position, channel, max_weight), valid)


def stage_weights(gaps: Tensor, power: float, low: float = 0.25, high: float = 4.0) -> Tensor:
    """The macro weights, docs/methods/hgd.md.

    Args:
        gaps: (K,), how far the student is from the teacher at each stage, at least 0.
        power: η; 1 = stages that lag get more, 0 = uniform, -1 = all contribute equally.
        low, high: bounds, before the mean becomes 1.

    Returns:
        (K,), with mean 1; no gradient.
    """
    gaps = as_float(gaps.detach())[None]
    gaps = torch.maximum(gaps, 1e-6 * gaps.mean())  # a negative power of 0 is infinite
    weights = power_weights(gaps, power, torch.ones_like(gaps))[0].clamp(low, high)
    return weights / weights.mean()


def weighted_distance(
    student: Tensor,
    teacher: Tensor,
    position: Tensor,
    channel: Tensor,
    scale: Tensor,
    distance: str = "l2",
    max_weight: float = 10.0,
) -> Tensor:
    """The hands-on imitation loss of one stage, per image and channel, before its scale.

    Args:
        student, teacher: (N, C, h, w), the student after adapter and resizing.
        position: (N, h, w), at least 0, and 0 in the padding.
        channel: (N, C), at least 0.
        scale: (1,) or (C,), squared scale of the teacher in this batch; only "smooth_l1" reads it,
            which is linear beyond its root.
        distance: one of :data:`DISTANCES`.
        max_weight: as in :func:`element_weights`.

    Returns:
        (N, C), whose mean over C is the mean of W · D over valid elements.
    """
    # With a mean weight of 1, mean(W D) is sum(W D) / sum(W) for any multiple of W.
    weights = clipped_product(position, channel, max_weight)
    beta = scale.sqrt()[:, None, None]
    gap = DISTANCES[distance].between(as_float(student), as_float(teacher), beta)
    total = weights.sum((1, 2, 3)).clamp(min=TINY)[:, None]
    # In place, but for the distances of positions: one full map less at the peak
    weighted = gap.mul_(weights) if gap.shape == weights.shape else gap * weights
    return weighted.sum((2, 3)) * channel.shape[1] / total


class Compared(NamedTuple):
    """A pair of stages in a step, at the size at which they are compared."""

    adapted: Tensor  # (N, C, h, w), of the student
    target: Tensor  # (N, C, h, w), of the teacher
    stride: int
    valid: Tensor  # (N, h, w) bool, cells outside of the padding
    scale: Tensor  # (1,) or (C,), squared scale of the target in this batch
    position: Tensor  # (N, h, w), the micro weights are its product with the next
    channel: Tensor  # (N, C)

    def weights(self, max_weight: float) -> Tensor:
        """The micro weights, (N, C, h, w), 0 in the padding."""
        product = clipped_product(self.position, self.channel, max_weight)
        return with_mean_one(product, self.valid)

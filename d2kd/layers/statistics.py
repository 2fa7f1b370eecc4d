"""Mean and standard deviation of feature channels over a batch, and how to change them.

Shapes: N images, C channels, (h, w) the size of an FPN level.
"""

import math
from typing import Tuple

import torch
from torch import Tensor

from .precision import as_float

# Keeps a constant channel from a division by 0 (CrossKD's and PKD's code).
EPS = 1e-6
# An almost dead channel of a student is stretched by no more than this, and so is its gradient;
# CrossKD's and PKD's code stretch up to a millionfold. Channels that are alive stay far below.
MAX_GAIN = 1e3
_TINY = 1e-12


@torch.no_grad()
def channel_statistics(features: Tensor) -> Tuple[Tensor, Tensor]:
    """
    Args:
        features: (N, C, h, w).

    Returns:
        mean and unbiased standard deviation over images and locations, (1, C, 1, 1) each. The
        deviation of a level with a single element is 0.
    """
    features = as_float(features)
    mean = features.mean(dim=(0, 2, 3), keepdim=True)
    return mean, _std(features - mean)


def _std(centered: Tensor) -> Tensor:
    # Norms of rows, then of these: on a CPU many times faster than a variance across images.
    norm = torch.linalg.vector_norm(centered.flatten(2), dim=2)
    norm = torch.linalg.vector_norm(norm, dim=0)
    return norm[None, :, None, None] / math.sqrt(max(_count(centered) - 1, 1))


def _count(features: Tensor) -> int:
    return features.numel() // features.shape[1]


def transfer_statistics(
    features: Tensor, mean: Tensor, std: Tensor, max_gain: float = math.inf, relu: bool = False
) -> Tensor:
    """Gives every channel another mean and standard deviation.

    Args:
        features: (N, C, h, w); the gradient goes through its own statistics.
        mean, std: (1, C, 1, 1); get no gradient.
        max_gain: a channel is stretched by this at most, which bounds values and gradients of
            channels that are nearly constant.
        relu: set what is negative afterwards to 0.

    Returns:
        (N, C, h, w), at least float32: (x - μ) · min(std / (σ + ε), max_gain) + mean.
    """
    return _TransferStatistics.apply(as_float(features), mean, std, max_gain, relu)


class _TransferStatistics(torch.autograd.Function):
    """Takes one buffer forward and one or two backward, and keeps no map but its input. With
    torch's own operations there are five at the peak instead of two, and they take 2.2 times as
    long (a map of (2, 256, 64, 64) on a CPU)."""

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, std: Tensor, max_gain: float, relu: bool) -> Tensor:
        own_mean = x.mean(dim=(0, 2, 3), keepdim=True)
        out = x - own_mean
        own_std = _std(out)
        gain = std / (own_std + EPS)
        # d gain / d x_i = slope · (x_i - μ)
        slope = -gain / ((own_std + EPS) * own_std.clamp(min=_TINY) * max(_count(x) - 1, 1))
        slope = slope * (gain < max_gain)
        gain = gain.clamp(max=max_gain)
        ctx.save_for_backward(x, own_mean, gain, slope, mean)
        ctx.relu = relu
        out.mul_(gain).add_(mean)
        return out.relu_() if relu else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, mean, gain, slope, target = ctx.saved_tensors
        if ctx.relu:  # the gradient passes where the output, by the same steps, is positive
            grad = grad.masked_fill((x - mean).mul_(gain).add_(target) <= 0, 0)
        total = grad.sum(dim=(0, 2, 3), keepdim=True)
        out = grad * x
        slope = slope * (out.sum(dim=(0, 2, 3), keepdim=True) - total * mean)
        torch.mul(grad, gain, out=out)
        out.addcmul_(x, slope).sub_(gain * total / _count(x) + slope * mean)
        return out, None, None, None, None

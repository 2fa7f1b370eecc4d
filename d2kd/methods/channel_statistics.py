"""Mean and standard deviation of feature channels, with a gradient that stays finite.

Shapes: N images, C channels, (h, w) the size of an FPN level.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Keeps a constant channel from a division by 0 (CrossKD's and PKD's code).
EPS = 1e-6


class ChannelStatistics(NamedTuple):
    """Per channel over the images and locations of one level."""

    centered: Tensor  # (N, C, h, w), the features minus their mean
    mean: Tensor  # (1, C, 1, 1)
    std: Tensor  # (1, C, 1, 1), unbiased


def channel_statistics(features: Tensor) -> ChannelStatistics:
    """
    Args:
        features: (N, C, h, w); half precision is computed as float32.

    Returns:
        see :class:`ChannelStatistics`. The standard deviation of a constant channel, or of a level
        with a single element, is 0 and has gradient 0.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    mean = features.mean(dim=(0, 2, 3), keepdim=True)
    centered = features - mean
    # Norms of rows, then of these: on a CPU many times faster than a variance across images.
    norm = torch.linalg.vector_norm(centered.flatten(2), dim=2)
    norm = torch.linalg.vector_norm(norm, dim=0)
    count = features.numel() // features.shape[1]
    std = norm / math.sqrt(max(count - 1, 1))
    return ChannelStatistics(centered, mean, std[None, :, None, None])

"""Adapters: modules that map a student tensor into the teacher's space and are thrown away
after training."""

from typing import Iterable, Tuple

from torch import nn


def conv_adapters(channels: Iterable[Tuple[int, int]], kernel_size: int = 3) -> nn.ModuleList:
    """One convolution per FPN level, with bias, without norm or activation, that keeps the size.

    Args:
        channels: (student channels, teacher channels) per level.
        kernel_size: odd.
    """
    return nn.ModuleList(
        nn.Conv2d(c_s, c_t, kernel_size, padding=kernel_size // 2) for c_s, c_t in channels
    )

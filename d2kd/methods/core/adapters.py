"""Adapters: modules that map a student tensor into the teacher's space and are thrown away
after training."""

from typing import Iterable, Tuple

from fvcore.nn.weight_init import c2_msra_fill
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


def identity_adapters(channels: Iterable[Tuple[int, int]]) -> nn.ModuleList:
    """One 1×1 convolution per stage, with bias, without norm or activation: the identity at first
    where the widths agree, else with Kaiming's initialisation.

    Args:
        channels: (student channels, teacher channels) per stage.
    """
    adapters = conv_adapters(channels, kernel_size=1)
    for conv in adapters:
        c2_msra_fill(conv)
        if conv.in_channels == conv.out_channels:
            nn.init.dirac_(conv.weight)
    return adapters


def matching_adapters(channels: Iterable[Tuple[int, int]]) -> nn.ModuleList:
    """Nothing where the widths agree, else a 1×1 convolution with bias.

    Args:
        channels: (student channels, teacher channels) per level.
    """
    return nn.ModuleList(
        nn.Identity() if c_s == c_t else nn.Conv2d(c_s, c_t, 1) for c_s, c_t in channels
    )

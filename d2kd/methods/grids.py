"""Feature maps of several sizes: which of their cells belong to images, and bringing them together.

Shapes: N images, (h, w) the size of a map.
"""

from typing import Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F


def valid_cells(
    image_sizes: Sequence[Tuple[int, int]], size: Tuple[int, int], stride: int, device
) -> Tensor:
    """Marks the cells whose centre lies in the image, not in the padding. The first cell always
    counts, so that no image is without any.

    Args:
        image_sizes: (height, width) of each image in pixels, before padding.
        size: (h, w) of the map.
        stride: pixels per cell.
        device: where the mask is wanted.

    Returns:
        (N, h, w) bool.
    """
    sizes = torch.tensor(image_sizes).to(device, non_blocking=True).clamp(min=stride)
    rows, columns = (
        (torch.arange(n, device=device) + 0.5) * stride < sizes[:, i, None]
        for i, n in enumerate(size)
    )
    return rows[:, :, None] & columns[:, None]


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(N, C, ...) -> (N, C, *size): averages a map that is nowhere smaller, interpolates others."""
    if x.shape[-2] >= size[0] and x.shape[-1] >= size[1]:
        return x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size, mode="bilinear", align_corners=False)

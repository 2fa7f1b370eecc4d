"""Cells of feature maps: those that objects cover, and those that belong to images.

Shapes: N images, G boxes of an image, (h, w) the size of a level, L levels.
"""

import math
from typing import List, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Boxes below twice this size, in pixels, belong to the finest level, whatever its stride (DeFeat).
FINEST_SCALE = 56

# Where there are objects: in a box on the level of its size, in a box on every level, or everywhere
ASSIGNMENTS = ("official", "all_levels", "everywhere")


def object_masks(
    boxes: Sequence[Tensor],
    sizes: Sequence[Tuple[int, int]],
    strides: Sequence[int],
    assign: str = "official",
) -> List[Tensor]:
    """Marks the cells that boxes cover on the FPN levels.

    A cell is covered from the truncated corner of a box up to, without it, the cell of the
    opposite corner. A box within one row or column of cells marks only its first cell.

    Args:
        boxes: per image, (G, 4) xyxy in pixels of the padded batch.
        sizes: (h, w) per level, finest first.
        strides: pixels per cell, per level.
        assign: one of :data:`ASSIGNMENTS`.

    Returns:
        (N, h, w) bool per level.
    """
    if assign == "everywhere":
        return [boxes[0].new_ones((len(boxes), *size), dtype=torch.bool) for size in sizes]
    # NaN compares as false with everything, so the padding marks nothing.
    padded = pad_sequence([b.float() for b in boxes], batch_first=True, padding_value=math.nan)
    level_of_box = _assigned_levels(padded, len(sizes))
    masks = []
    for level, (size, stride) in enumerate(zip(sizes, strides)):
        rows, columns = _covered_cells(padded, size, stride)
        if assign == "official":
            rows = rows & (level_of_box == level)[..., None]
        masks.append(torch.einsum("ngy,ngx->nyx", rows.float(), columns.float()) > 0)
    return masks


def _assigned_levels(boxes: Tensor, num_levels: int) -> Tensor:
    """The level of each box by its size, (N, G), as floats. The sides count one pixel more."""
    width, height = (boxes[..., 2:] - boxes[..., :2] + 1).unbind(-1)
    level = torch.log2((width * height).sqrt() / FINEST_SCALE + 1e-6).floor()
    return level.clamp(0, num_levels - 1)


def _covered_cells(boxes: Tensor, size: Tuple[int, int], stride: int) -> Tuple[Tensor, Tensor]:
    """Which rows (N, G, h) and columns (N, G, w) of one level each box covers."""
    left, top, right, bottom = (boxes / stride).trunc().unbind(-1)
    h, w = size
    left, top = left.clamp(min=0), top.clamp(min=0)
    right, bottom = right.clamp(max=w), bottom.clamp(max=h)
    thin = (left == right) | (top == bottom)
    return _span(top, bottom, thin, h), _span(left, right, thin, w)


def _span(first: Tensor, end: Tensor, thin: Tensor, size: int) -> Tensor:
    first = torch.where(thin, first.clamp(max=size - 1), first)
    end = torch.where(thin, first + 1, end)
    cells = torch.arange(size, device=first.device)
    return (cells >= first[..., None]) & (cells < end[..., None])


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

"""From the maps of a dense head to its anchors.

Shapes: N images, A anchors per location, D numbers per anchor, (h, w) the size of a level. Anchors
stand in Detectron2's order: row, column, anchor.
"""

from typing import List, Sequence

from torch import Tensor

from .precision import as_float


def flatten_anchors(levels: Sequence[Tensor], num_anchors: int = 1) -> List[Tensor]:
    """
    Args:
        levels: (N, A·D, h, w) per level.
        num_anchors: A.

    Returns:
        (N, h·w·A, D) per level.
    """
    return [x.unflatten(1, (num_anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels]


def flatten_scalars(levels: Sequence[Tensor]) -> List[Tensor]:
    """One number per anchor: (N, A, h, w) -> (N, h·w·A), per level."""
    return [x.permute(0, 2, 3, 1).flatten(1) for x in levels]


def highest_logits(logits: Sequence[Tensor], num_anchors: int) -> List[Tensor]:
    """How sure a dense head is that an anchor holds an object: the sigmoid of this.

    Args:
        logits: (N, A·K, h, w) per level, K sigmoid class logits per anchor.
        num_anchors: A.

    Returns:
        the highest class logit of each anchor, (N, h·w·A) per level, float32, without gradient.
    """
    highest = [x.detach().unflatten(1, (num_anchors, -1)).amax(dim=2) for x in logits]
    return [as_float(x) for x in flatten_scalars(highest)]

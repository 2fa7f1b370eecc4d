"""From the maps of a dense head to its anchors.

Shapes: N images, A anchors per location, (h, w) the size of a level. Anchors stand in Detectron2's
order: row, column, anchor, as its ``permute_to_N_HWA_K`` puts them.
"""

from torch import Tensor

from .precision import as_float


def flatten_scalars(level: Tensor) -> Tensor:
    """One number per anchor: (N, A, h, w) -> (N, h·w·A)."""
    return level.permute(0, 2, 3, 1).flatten(1)


def highest_logits(logits: Tensor, num_anchors: int) -> Tensor:
    """How sure a dense head is that an anchor holds an object: the sigmoid of this.

    Args:
        logits: (N, A·K, h, w), K sigmoid class logits per anchor.
        num_anchors: A.

    Returns:
        the highest class logit of each anchor, (N, h·w·A), float32, without gradient.
    """
    highest = logits.detach().unflatten(1, (num_anchors, -1)).amax(dim=2)
    return as_float(flatten_scalars(highest))

"""Losses of GFL, and the labels that they take. All keep the type of their arguments: give them
float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(...) -> (..., K) float; labels outside 0 ... K - 1 (background, ignored) give zeros."""
    return (labels[..., None] == torch.arange(num_classes, device=labels.device)).float()


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss, GFL eq. 5: ``|q - sigmoid(x)|^beta * BCE(x, q)``.

    Args:
        logits: x, any shape.
        quality: q in [0, 1], same shape; 0 for all but the assigned class.
        beta: how fast good predictions lose weight.

    Returns:
        the loss of every element, same shape.
    """
    error = (quality - logits.sigmoid()).abs()
    return error.pow(beta) * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss, GFL eq. 6: cross-entropy with the two bins around a distance,
    each weighted by how near it is.

    Args:
        logits: (..., B) over the distances 0, 1, ..., B - 1.
        distances: (...) in [0, B - 1).

    Returns:
        (...).
    """
    log_p = logits.log_softmax(dim=-1)
    left = distances.floor()
    near_left = log_p.gather(-1, left.long()[..., None])[..., 0]
    near_right = log_p.gather(-1, left.long()[..., None] + 1)[..., 0]
    return -(left + 1 - distances) * near_left - (distances - left) * near_right

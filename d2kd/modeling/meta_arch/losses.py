"""Losses that ATSS, GFL and the FCOS of the papers are made of.

All keep the type of their arguments: give them float32. Boxes are (x1, y1, x2, y2).
"""

from typing import Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor

# Least area of a union or an enclosing box (mmdet's IoU losses)
_MIN_AREA = 1e-6


def mean_over_gpus(values: Tensor) -> Tensor:
    """Mean of a small tensor over all processes. One communication, no gradient."""
    values = values.detach()
    if comm.get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / comm.get_world_size()


def paired_iou(boxes: Tensor, targets: Tensor) -> Tuple[Tensor, Tensor]:
    """IoU and generalized IoU (arXiv 1902.09630) of boxes that belong together.

    Args:
        boxes, targets: (..., 4), same unit.

    Returns:
        IoU in [0, 1] and GIoU in [-1, 1], both (...).
    """
    overlap = _area(
        torch.maximum(boxes[..., :2], targets[..., :2]),
        torch.minimum(boxes[..., 2:], targets[..., 2:]),
    )
    enclosing = _area(
        torch.minimum(boxes[..., :2], targets[..., :2]),
        torch.maximum(boxes[..., 2:], targets[..., 2:]),
    ).clamp(min=_MIN_AREA)
    areas = _area(boxes[..., :2], boxes[..., 2:]) + _area(targets[..., :2], targets[..., 2:])
    union = (areas - overlap).clamp(min=_MIN_AREA)
    iou = overlap / union
    return iou, iou - (enclosing - union) / enclosing


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    return (bottom_right - top_left).clamp(min=0).prod(dim=-1)


def decode_positives(
    transform, deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, positive: Tensor
) -> Tensor:
    """Predicted boxes of the positives. For all others the target itself, so that no wild
    prediction of theirs can make the masked sum of a box loss, or its gradient, NaN.

    Args:
        transform: one of the box transforms.
        deltas: (N, R, D).
        anchors: (R, 4).
        gt_boxes: (N, R, 4).
        positive: (N, R) bool.

    Returns:
        (N, R, 4) in pixels.
    """
    repeated = anchors.expand(len(deltas), -1, -1).flatten(0, 1)
    boxes = transform.apply_deltas(deltas.flatten(0, 1), repeated)
    return torch.where(positive[..., None], boxes.view_as(gt_boxes), gt_boxes)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(...) -> (..., K) float; labels outside 0 ... K - 1 (background, ignored) give zeros."""
    return (labels[..., None] == torch.arange(num_classes, device=labels.device)).float()


def iou_log_loss(iou: Tensor) -> Tensor:
    """``-log IoU``, the box loss of FCOS ("UnitBox"); no gradient below an IoU of 1e-6."""
    return -iou.clamp(min=1e-6).log()


def centerness_targets(centers: Tensor, gt_boxes: Tensor, positive: Tensor) -> Tensor:
    """How central a location is in its box, FCOS eq. 3.

    Args:
        centers: (R, 2) locations (x, y).
        gt_boxes: (N, R, 4) the boxes assigned to them.
        positive: (N, R) bool, which of them lie inside their box.

    Returns:
        (N, R) in [0, 1]: 1 at the centre of a box, 0 on its border and for negatives.
    """
    before, after = centers - gt_boxes[..., :2], gt_boxes[..., 2:] - centers
    ratios = torch.minimum(before, after) / torch.maximum(before, after)
    return torch.where(positive, ratios.prod(dim=-1).sqrt(), torch.zeros_like(ratios[..., 0]))


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

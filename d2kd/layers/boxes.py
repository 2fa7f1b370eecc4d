"""Boxes that belong together, (x1, y1, x2, y2) in pixels: IoU, its losses, centerness.

All functions keep the type of their arguments: give them float32.
"""

from typing import Tuple

import torch
from torch import Tensor

# Least area of a union or an enclosing box (mmdet's IoU losses)
_MIN_AREA = 1e-6


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
    width, height = (bottom_right - top_left).clamp(min=0).unbind(dim=-1)
    return width * height  # the gradient of prod() makes the host wait


def iou_log_loss(iou: Tensor) -> Tensor:
    """``-log IoU``, the box loss of FCOS ("UnitBox"); no gradient below an IoU of 1e-6."""
    return -iou.clamp(min=1e-6).log()


def centerness_targets(centers: Tensor, gt_boxes: Tensor, positive: Tensor) -> Tensor:
    """How central a location is in its box, FCOS eq. 3.

    Args:
        centers: (R, 2) locations (x, y).
        gt_boxes: (N, R, 4) the boxes assigned to them.
        positive: (N, R) bool, which of them learn their box.

    Returns:
        (N, R) in [0, 1]: 1 at the centre of a box, 0 on its border, outside, and for negatives.
    """
    before, after = centers - gt_boxes[..., :2], gt_boxes[..., 2:] - centers
    ratios = torch.minimum(before, after).clamp(min=0) / torch.maximum(before, after)
    return torch.where(positive, ratios.prod(dim=-1).sqrt(), torch.zeros_like(ratios[..., 0]))


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

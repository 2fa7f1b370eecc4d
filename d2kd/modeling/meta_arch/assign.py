"""Which ground-truth box each anchor or point learns.

Shapes: G ground-truth boxes of one image, R anchors of all levels, K classes. Boxes are
(x1, y1, x2, y2) in pixels.
"""

from typing import List, Tuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances, pairwise_iou, pairwise_point_box_distance
from torch import Tensor

# A candidate's centre must lie inside the box by more than this, in pixels (ATSS' own code).
_MIN_MARGIN = 0.01


@torch.no_grad()
def assign_atss(
    anchors: List[Tensor], valid: Tensor, gt_boxes: Tensor, num_candidates: int = 9
) -> Tensor:
    """Adaptive training sample selection ("Bridging the Gap Between Anchor-based and Anchor-free
    Detection", section 4).

    The nearest anchors of every level are a box's candidates. Positive are those whose IoU with
    it reaches mean + standard deviation of the candidates' IoUs and whose centre is inside it.
    An anchor that is positive for several boxes takes the one with the largest IoU.

    Args:
        anchors: (R_l, 4) per level.
        valid: (R,) bool, the anchors that may be candidates.
        gt_boxes: (G, 4).
        num_candidates: per level and box, at most.

    Returns:
        (R,) index of the box, G for background.
    """
    boxes = torch.cat(anchors)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    gt_centers = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    distances = (centers - gt_centers[:, None]).square().sum(dim=2)  # (G, R)
    distances = distances.masked_fill(~valid, float("inf"))

    candidates = _nearest_per_level(distances, [len(x) for x in anchors], num_candidates)  # (G, C)
    is_candidate = distances.gather(1, candidates).isfinite()
    iou = pairwise_iou(Boxes(gt_boxes), Boxes(boxes)).gather(1, candidates)
    margin = torch.cat(
        (centers[candidates] - gt_boxes[:, None, :2], gt_boxes[:, None, 2:] - centers[candidates]),
        dim=2,
    ).amin(dim=2)
    positive = is_candidate & (iou >= _mean_plus_std(iou, is_candidate)) & (margin > _MIN_MARGIN)

    quality = torch.full_like(distances, float("-inf"))
    return _best_box(quality.scatter(1, candidates, iou.masked_fill(~positive, float("-inf"))))


def _nearest_per_level(distances: Tensor, sizes: List[int], num_candidates: int) -> Tensor:
    nearest, start = [], 0
    for level in distances.split(sizes, dim=1):
        k = min(num_candidates, level.shape[1])
        nearest.append(level.topk(k, dim=1, largest=False).indices + start)
        start += level.shape[1]
    return torch.cat(nearest, dim=1)


def _mean_plus_std(values: Tensor, mask: Tensor) -> Tensor:
    """Mean + unbiased standard deviation of the chosen values of each row, (G, C) -> (G, 1)."""
    count = mask.sum(dim=1, keepdim=True)
    mean = (values * mask).sum(dim=1, keepdim=True) / count
    variance = ((values - mean).square() * mask).sum(dim=1, keepdim=True) / (count - 1)
    return mean + variance.sqrt()


@torch.no_grad()
def assign_fcos(points: List[Boxes], gt_boxes: Tensor) -> Tensor:
    """The rule of the FCOS papers: a point learns the smallest box around it, on the level whose
    range has the largest of the four distances. Ranges are closed; boxes have no central region.

    Args:
        points: per level, squares around the points, as wide as the stride s. A level's range is
            4 s to 8 s, from 0 on the finest level, without end on the coarsest.
        gt_boxes: (G, 4).

    Returns:
        (R,) index of the box, G for background.
    """
    strides = torch.cat([p.tensor[:, 2] - p.tensor[:, 0] for p in points])
    lower, upper = strides * 4, strides * 8
    lower[: len(points[0])] = 0
    upper[-len(points[-1]) :] = float("inf")

    centers = Boxes.cat(points).get_centers()
    distances = pairwise_point_box_distance(centers, Boxes(gt_boxes))  # (R, G, 4)
    inside = distances.amin(dim=2) > 0
    largest = distances.amax(dim=2)
    allowed = inside & (largest >= lower[:, None]) & (largest <= upper[:, None])
    areas = Boxes(gt_boxes).area()
    return _best_box((-areas[:, None]).masked_fill(~allowed.t(), float("-inf")))


def _best_box(quality: Tensor) -> Tensor:
    """Per column of (G, R) the row with the largest quality, G where all are -inf."""
    background = torch.finfo(quality.dtype).min
    return F.pad(quality, (0, 0, 0, 1), value=background).argmax(dim=0)


def assigned_targets(index: Tensor, gt: Instances, num_classes: int) -> Tuple[Tensor, Tensor]:
    """
    Args:
        index: (R,) what one of the assigners returned.
        gt: the image's ground truth.
        num_classes: K.

    Returns:
        labels (R,), K for background; boxes (R, 4), zeros for background.
    """
    labels = F.pad(gt.gt_classes, (0, 1), value=num_classes)[index]
    return labels, F.pad(gt.gt_boxes.tensor, (0, 0, 0, 1))[index]

"""Regions of a dense detector: its own predicted boxes, sampled as a two-stage detector samples
its proposals, each with the anchor that predicted it. How many there are is known beforehand, so
that the host waits for nothing but the suppression, once per batch (torchvision's, which goes
through images and levels one by one above 25 000 boxes on a GPU).

Shapes: N images, A anchors per location, R anchors of all levels (level, row, column, anchor),
k candidates of an image, K classes.
"""

import math
from typing import List, NamedTuple, Tuple

import torch
from detectron2.layers import batched_nms, cat
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor
from torch.nn import functional as F

from d2kd.layers import highest_logits
from d2kd.views import RegionSet, StudentView


class DenseSampling(NamedTuple):
    """How many boxes are taken, and which."""

    pre_nms_topk: int  # best anchors per level and image
    post_nms_topk: int  # best boxes per image
    rois_per_image: int
    nms_thresh: float = 0.7  # IoU, within a level
    positive_iou: float = 0.5  # with an object, from which on a box is positive
    positive_fraction: float = 0.25  # of them, at most


class _Candidates(NamedTuple):
    """Predicted boxes. Those that are left out have the score -inf."""

    boxes: Tensor  # (N, k, 4) in pixels
    scores: Tensor  # (N, k)
    anchors: Tensor  # (N, k), places in 0 ... R - 1
    levels: Tensor  # (N, k)

    def best(self, count: int) -> "_Candidates":
        """Those of the highest scores of each image, in this order."""
        return self.rows(self.scores.topk(min(count, self.scores.shape[1]), dim=1).indices)

    def rows(self, index: Tensor) -> "_Candidates":
        """Some candidates of each image: index is (N, number of them)."""
        boxes = self.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return _Candidates(boxes, *[x.gather(1, index) for x in self[1:]])

    def only(self, chosen: Tensor) -> "_Candidates":
        """Leaves out all but those chosen by (N, k) bool."""
        return self._replace(scores=self.scores.masked_fill(~chosen, -math.inf))


@torch.no_grad()
def sample_predicted_boxes(
    view: StudentView, targets: List[Instances], sampling: DenseSampling
) -> RegionSet:
    """Samples the boxes that a dense student predicts, with the anchors that predicted them.

    Args:
        view: the student's.
        targets: ground truth per image.
        sampling: see there.

    Returns:
        the same number of regions for every image. Where there are fewer, others fill up, which
        are not valid.
    """
    num_classes = view.family.num_classes
    found = _suppress(_clip(_candidates(view, sampling.pre_nms_topk), targets), sampling)
    valid = found.scores.isfinite()
    classes = [_label(b, t, num_classes, sampling) for b, t in zip(found.boxes, targets)]
    classes = torch.stack(classes).masked_fill(~valid, num_classes)
    rows, valid = _sample(valid, classes < num_classes, sampling)
    sampled = found.rows(rows)
    return RegionSet(
        [Boxes(b) for b in sampled.boxes],
        classes.gather(1, rows).unbind(),
        sampled.anchors.unbind(),
        valid=valid.flatten(),
    )


def _candidates(view: StudentView, count: int) -> _Candidates:
    """The best anchors of every level."""
    num_anchors = view.family.dense_head.num_anchors
    scores = [highest_logits(logits, num_anchors) for logits in view.predictions.logits]
    boxes = view.decode([x.detach() for x in view.predictions.deltas])
    found, start = [], 0
    for level, x in enumerate(scores):
        anchors = torch.arange(start, start + x.shape[1], device=x.device).expand_as(x)
        of_level = boxes[:, start : start + x.shape[1]]
        found.append(_Candidates(of_level, x, anchors, torch.full_like(anchors, level)).best(count))
        start += x.shape[1]
    return _Candidates(*[torch.cat(parts, dim=1) for parts in zip(*found)])


def _clip(candidates: _Candidates, targets: List[Instances]) -> _Candidates:
    """Clips boxes to their images, and leaves out those that are empty or not finite. (Detectron2's
    ``Boxes.clip`` makes the host wait, once per image.)"""
    limits = torch.tensor([target.image_size[::-1] * 2 for target in targets])  # (N, 4): w, h, w, h
    limits = limits.to(candidates.boxes.device, non_blocking=True)[:, None]
    boxes = torch.minimum(candidates.boxes.nan_to_num().clamp(min=0), limits)
    finite = candidates.boxes.isfinite().all(dim=2) & candidates.scores.isfinite()
    usable = finite & (boxes[..., 2:] > boxes[..., :2]).all(dim=2)
    return candidates._replace(boxes=boxes).only(usable)


def _suppress(candidates: _Candidates, sampling: DenseSampling) -> _Candidates:
    """The best boxes that do not overlap too much with better ones of their image and level."""
    boxes, scores, _, levels = candidates
    image = torch.arange(len(boxes), device=boxes.device)[:, None]
    groups = (levels * len(boxes) + image).flatten()
    kept = batched_nms(boxes.flatten(0, 1), scores.flatten(), groups, sampling.nms_thresh)
    chosen = torch.zeros_like(groups, dtype=torch.bool).index_fill(0, kept, True)
    return candidates.only(chosen.view_as(scores)).best(sampling.post_nms_topk)


def _label(boxes: Tensor, target: Instances, num_classes: int, sampling: DenseSampling) -> Tensor:
    """The class of the object that each box (k, 4) overlaps most, K if by less than it must, (k,).
    Objects are not added to the boxes: they come from no anchor."""
    iou = pairwise_iou(target.gt_boxes, Boxes(boxes))
    iou = F.pad(iou.masked_fill(iou < sampling.positive_iou, -1), (0, 0, 0, 1))  # background: 0
    return F.pad(target.gt_classes, (0, 1), value=num_classes)[iou.argmax(dim=0)]


def _sample(valid: Tensor, positive: Tensor, sampling: DenseSampling) -> Tuple[Tensor, Tensor]:
    """Samples at random, as Detectron2's ``subsample_labels`` does, the same number of each image.

    Args:
        valid: (N, k) bool, what may be sampled.
        positive: (N, k) bool, those of them that are positive.
        sampling: how many.

    Returns:
        the sampled columns, and which of them are valid, (N, number of them) each.
    """
    order = (torch.rand(valid.shape, device=valid.device) + positive).argsort(1, descending=True)
    most = int(sampling.rois_per_image * sampling.positive_fraction)
    surplus = positive.gather(1, order)  # positives come first
    surplus[:, :most] = False
    usable = valid.gather(1, order) & ~surplus
    first = usable.byte().argsort(dim=1, descending=True, stable=True)
    first = first[:, : sampling.rois_per_image]
    return order.gather(1, first), usable.gather(1, first)


def vectors_of(levels: List[Tensor], anchors: List[Tensor], num_anchors: int) -> Tensor:
    """What per-level maps hold at the location of anchors.

    Args:
        levels: (N, C, h, w) of all levels, finest first.
        anchors: per image, places in 0 ... R - 1.
        num_anchors: A.

    Returns:
        (number of anchors of all images, C), with gradient.
    """
    locations = torch.cat([x.flatten(2) for x in levels], dim=2)  # (N, C, R / A)
    image = cat([torch.full_like(a, i) for i, a in enumerate(anchors)])
    return locations.transpose(1, 2)[image, cat(anchors) // num_anchors]

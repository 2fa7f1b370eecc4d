"""Regions of a dense detector: its own predicted boxes, sampled as a two-stage detector samples
its proposals, each with the anchor that predicted it.

Shapes: N images, A anchors per location, R anchors of all levels (level, row, column, anchor),
k candidates of an image, K classes.
"""

from typing import List, NamedTuple, Sequence

import torch
from detectron2.layers import batched_nms, cat
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from d2kd.modeling.channel_statistics import as_float


class DenseSampling(NamedTuple):
    """How many boxes are taken, and which."""

    pre_nms_topk: int = 2000  # best anchors per level and image
    nms_thresh: float = 0.7  # IoU, within a level
    post_nms_topk: int = 1000  # best boxes per image
    positive_iou: float = 0.5  # with an object, from which on a box is positive
    rois_per_image: int = 512
    positive_fraction: float = 0.25  # at most so many of them
    use_centerness: bool = False  # score: √(class score · centerness), if there is a centerness


def _flatten(levels: Sequence[Tensor]) -> List[Tensor]:
    """Maps (N, A, h, w) -> (N, A·h·w) in the order (row, column, anchor), per level."""
    return [x.permute(0, 2, 3, 1).flatten(1) for x in levels]


def anchor_scores(dense, num_anchors: int, use_centerness: bool = False) -> List[Tensor]:
    """
    Args:
        dense: the dense head in a view, see :class:`~d2kd.modeling.dense_view.Dense`.
        num_anchors: A.
        use_centerness: see :class:`DenseSampling`.

    Returns:
        the highest class probability of each anchor, (N, A·h·w) per level, without gradient.
    """
    best = [x.detach().unflatten(1, (num_anchors, -1)).amax(dim=2) for x in dense.logits]
    scores = [as_float(x).sigmoid() for x in _flatten(best)]
    if use_centerness and dense.centerness is not None:
        centerness = [as_float(x.detach()).sigmoid() for x in _flatten(dense.centerness)]
        scores = [(s * c).sqrt() for s, c in zip(scores, centerness)]
    return scores


@torch.no_grad()
def dense_rois(view, targets: List[Instances], sampling: DenseSampling) -> List[Instances]:
    """Samples the boxes that a dense student predicts.

    Args:
        view: the student's.
        targets: ground truth per image.
        sampling: see there.

    Returns:
        per image, ``proposal_boxes``, ``gt_classes`` (K = background) and ``anchors``, the place
        in 0 ... R - 1 of the anchor that predicted the box. There may be none.
    """
    family, dense = view.family, view.dense
    scores = anchor_scores(dense, family.dense_head.num_anchors, sampling.use_centerness)
    boxes = dense.decode([x.detach() for x in dense.deltas])
    best, places, levels, start = [], [], [], 0
    for level, x in enumerate(scores):
        top = x.topk(min(sampling.pre_nms_topk, x.shape[1]), dim=1)
        best.append(top.values)
        places.append(top.indices + start)
        levels.append(torch.full_like(top.indices[0], level))
        start += x.shape[1]
    best, places, levels = torch.cat(best, dim=1), torch.cat(places, dim=1), torch.cat(levels)
    boxes = boxes.gather(1, places[..., None].expand(-1, -1, 4))
    return [
        _sample(_suppress(*of_image, levels, target.image_size, sampling), target, family, sampling)
        for *of_image, target in zip(boxes, best, places, targets)
    ]


def _suppress(
    boxes: Tensor, scores: Tensor, anchors: Tensor, levels: Tensor, image_size, sampling
) -> Instances:
    """The best boxes of an image that do not overlap too much with better ones of their level."""
    finite = boxes.isfinite().all(dim=1) & scores.isfinite()
    boxes = Boxes(boxes.nan_to_num())
    boxes.clip(image_size)
    usable = finite & boxes.nonempty()
    boxes, scores, anchors, levels = (x[usable] for x in (boxes, scores, anchors, levels))
    keep = batched_nms(boxes.tensor, scores, levels, sampling.nms_thresh)
    keep = keep[: sampling.post_nms_topk]
    return Instances(image_size, proposal_boxes=boxes[keep], anchors=anchors[keep])


def _sample(proposals: Instances, target: Instances, family, sampling: DenseSampling) -> Instances:
    """Labels boxes by their IoU with the objects and samples them. Objects are not added: they
    come from no anchor."""
    matcher = Matcher([sampling.positive_iou], [0, 1], allow_low_quality_matches=False)
    matched, positive = matcher(pairwise_iou(target.gt_boxes, proposals.proposal_boxes))
    background = torch.full_like(matched, family.num_classes)
    classes = target.gt_classes[matched] if len(target) else background
    proposals.gt_classes = torch.where(positive == 1, classes, background)
    sampled = subsample_labels(
        proposals.gt_classes,
        sampling.rois_per_image,
        sampling.positive_fraction,
        family.num_classes,
    )
    return proposals[torch.cat(sampled)]


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

"""FCOS as in its paper (arXiv 1904.01355) and in the code that knowledge distillation papers build
on. It differs from Detectron2's FCOS in the boxes, the positives, the normalisers and the score."""

from typing import Dict, List, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor

from d2kd.layers import (
    centerness_targets,
    decode_positives,
    iou_log_loss,
    mean_over_gpus,
    one_hot,
    paired_iou,
)

from .assign import assign_fcos, assigned_targets
from .fcos import FCOS
from .inference import detect
from .scaled_head import ScaledHead


class PaperFCOSHead(ScaledHead):
    """Centerness on the class tower; ``deltas`` are distances in pixels."""

    def __init__(self, **kwargs):
        super().__init__(centerness_branch="cls", **kwargs)

    def predict(self, branch: str, tower: Tensor, level: int) -> Dict[str, Tensor]:
        outputs = super().predict(branch, tower, level)
        if branch == "bbox":
            outputs["deltas"] = outputs["deltas"].exp()
        return outputs


@META_ARCH_REGISTRY.register()
class PaperFCOS(FCOS):
    """FCOS with distances ``exp(scale x)`` in pixels, a log-IoU loss weighted by centerness, all
    points inside a box as its positives, and normalisers averaged over GPUs.

    Reads ``MODEL.FCOS``; ``CENTER_SAMPLING_RADIUS`` has no meaning here.
    """

    head_class = PaperFCOSHead

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: see :class:`FCOS`; the head is a :class:`PaperFCOSHead`.
        """
        transform = Box2BoxTransformLinear(normalize_by_size=False)
        super().__init__(box2box_transform=transform, **kwargs)

    @torch.no_grad()
    def label_anchors(self, anchors: List[Boxes], gt_instances: List[Instances]) -> Tuple:
        targets = [
            assigned_targets(assign_fcos(anchors, gt.gt_boxes.tensor), gt, self.num_classes)
            for gt in gt_instances
        ]
        return self.assigned(tuple(map(list, zip(*targets))))

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ) -> Dict[str, Tensor]:
        anchors = Boxes.cat(anchors)
        gt_labels, gt_boxes = torch.stack(gt_labels), torch.stack(gt_boxes)  # (N, R), (N, R, 4)
        logits, deltas, centerness = (
            torch.cat(x, dim=1).float() for x in (pred_logits, pred_anchor_deltas, pred_centerness)
        )
        positive = gt_labels < self.num_classes
        target = centerness_targets(anchors.get_centers(), gt_boxes, positive)
        sums = mean_over_gpus(torch.stack((positive.sum().float(), target.sum())))
        num_positive, sum_centerness = sums[0].clamp(min=1), sums[1].clamp(min=1e-6)

        loss_cls = sigmoid_focal_loss_jit(
            logits,
            one_hot(gt_labels, self.num_classes),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
            reduction="sum",
        )
        boxes = decode_positives(self.box2box_transform, deltas, anchors.tensor, gt_boxes, positive)
        iou, _ = paired_iou(boxes, gt_boxes)
        loss_centerness = F.binary_cross_entropy_with_logits(
            centerness[..., 0], target, reduction="none"
        )
        return {
            "loss_fcos_cls": loss_cls / num_positive,
            "loss_fcos_loc": (target * iou_log_loss(iou)).sum() / sum_centerness,
            "loss_fcos_ctr": (loss_centerness * positive).sum() / num_positive,
        }

    def forward_inference(
        self, images: ImageList, features: List[Tensor], predictions: List[List[Tensor]]
    ) -> List[Instances]:
        return detect(self, images, features, predictions)

"""ATSS, "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
Sample Selection" (arXiv 1912.02424)."""

from typing import Dict

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor

from d2kd.layers import centerness_targets, decode_positives, one_hot, paired_iou

from .arguments import detector_arguments
from .scaled_head import ScaledHead
from .single_anchor import SingleAnchorDetector


@META_ARCH_REGISTRY.register()
class ATSS(SingleAnchorDetector):
    """A RetinaNet with one anchor per location and a centerness, trained on ATSS' positives."""

    @configurable
    def __init__(self, *, focal_loss_alpha: float = 0.25, focal_loss_gamma: float = 2.0, **kwargs):
        """
        Args:
            focal_loss_alpha, focal_loss_gamma: as in Detectron2's ``RetinaNet``.
            kwargs: see :class:`SingleAnchorDetector`; the head predicts logits, deltas and
                centerness.
        """
        super().__init__(**kwargs)
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict:
        node = cfg.MODEL.ATSS
        return {
            **detector_arguments(cfg, "ATSS", ScaledHead, centerness_branch="bbox"),
            "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
            "box_loss_weight": node.BBOX_LOSS_WEIGHT,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        }

    def losses(
        self,
        anchors: Tensor,
        gt_labels: Tensor,
        gt_boxes: Tensor,
        logits: Tensor,
        deltas: Tensor,
        centerness: Tensor,
    ) -> Dict[str, Tensor]:
        """See :meth:`SingleAnchorDetector.losses`; logits (N, R, K), deltas (N, R, 4),
        centerness (N, R, 1)."""
        valid = gt_labels >= 0
        positive = valid & (gt_labels < self.num_classes)
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        target = centerness_targets(centers, gt_boxes, positive)
        num_positive, sum_centerness = self.normalizers(positive, target)

        loss_cls = sigmoid_focal_loss_jit(
            logits,
            one_hot(gt_labels, self.num_classes),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
        )
        boxes = decode_positives(self.box2box_transform, deltas, anchors, gt_boxes, positive)
        _, giou = paired_iou(boxes, gt_boxes)
        loss_centerness = F.binary_cross_entropy_with_logits(
            centerness[..., 0], target, reduction="none"
        )
        return {
            "loss_cls": (loss_cls * valid[..., None]).sum() / num_positive,
            # The centerness target is 0 for negatives.
            "loss_box_reg": self.box_loss_weight * (target * (1 - giou)).sum() / sum_centerness,
            "loss_centerness": (loss_centerness * positive).sum() / num_positive,
        }

"""GFL, "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object
Detection" (arXiv 2006.04388)."""

from typing import Dict

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from d2kd.layers import (
    decode_positives,
    distribution_focal_loss,
    one_hot,
    paired_iou,
    quality_focal_loss,
)

from .arguments import detector_arguments
from .integral import IntegralBoxTransform
from .scaled_head import ScaledHead
from .single_anchor import ANCHOR_SCALE, SingleAnchorDetector


@META_ARCH_REGISTRY.register()
class GFL(SingleAnchorDetector):
    """ATSS without centerness: the class score is the box's quality, and a box is four
    distributions of distances. The head's deltas are the logits of these, side by side."""

    @configurable
    def __init__(self, *, dfl_loss_weight: float = 0.25, **kwargs):
        """
        Args:
            dfl_loss_weight: weight of the distribution focal loss.
            kwargs: see :class:`SingleAnchorDetector`; ``box2box_transform`` is an
                :class:`~d2kd.modeling.meta_arch.integral.IntegralBoxTransform`, and the head
                predicts logits and 4 x its ``num_bins`` deltas.
        """
        super().__init__(**kwargs)
        self.dfl_loss_weight = dfl_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict:
        node = cfg.MODEL.GFL
        transform = IntegralBoxTransform(node.REG_MAX, ANCHOR_SCALE)
        return {
            **detector_arguments(cfg, "GFL", ScaledHead, box_dim=4 * transform.num_bins),
            "box2box_transform": transform,
            "box_loss_weight": node.BBOX_LOSS_WEIGHT,
            "dfl_loss_weight": node.DFL_LOSS_WEIGHT,
        }

    def losses(
        self, anchors: Tensor, gt_labels: Tensor, gt_boxes: Tensor, logits: Tensor, deltas: Tensor
    ) -> Dict[str, Tensor]:
        """See :meth:`SingleAnchorDetector.losses`; logits (N, R, K), deltas
        (N, R, 4 x num_bins)."""
        valid = gt_labels >= 0
        positive = valid & (gt_labels < self.num_classes)
        # Boxes count by the class score that the prediction itself claims.
        weight = logits.detach().sigmoid().amax(dim=2) * positive
        num_positive, sum_weight = self.normalizers(positive, weight)

        boxes = decode_positives(self.box2box_transform, deltas, anchors, gt_boxes, positive)
        iou, giou = paired_iou(boxes, gt_boxes)
        quality = one_hot(gt_labels, self.num_classes) * iou.detach()[..., None]
        loss_cls = quality_focal_loss(logits, quality)
        loss_dfl = distribution_focal_loss(
            deltas.unflatten(2, (4, -1)), self.box2box_transform.get_deltas(anchors, gt_boxes)
        ).mean(dim=2)
        return {
            "loss_cls": (loss_cls * valid[..., None]).sum() / num_positive,
            "loss_box_reg": self.box_loss_weight * (weight * (1 - giou)).sum() / sum_weight,
            "loss_dfl": self.dfl_loss_weight * (weight * loss_dfl).sum() / sum_weight,
        }

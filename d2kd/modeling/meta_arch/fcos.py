"""Detectron2's FCOS, built from a YAML config."""

from typing import Dict, List, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from d2kd.layers import as_float

from .arguments import detector_arguments
from .visualize import visualize_predictions


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's own FCOS with ``MODEL.FCOS`` as its config.

    Its weights interchange with those of Detectron2's ``configs/common/models/fcos.py``. Images
    without objects can be trained on with release 0.6 as well.
    """

    head_class = fcos.FCOSHead

    @configurable
    def __init__(self, *, vis_period: int = 0, input_format: str = "BGR", **kwargs):
        """
        Args:
            vis_period: iterations between two pictures of predictions; 0 for none.
            input_format: channel order of the images, for these pictures.
            kwargs: the arguments of Detectron2's FCOS.
        """
        super().__init__(**kwargs)
        self.vis_period = vis_period
        self.input_format = input_format
        self.assigned = nn.Identity()  # what label_anchors gives passes here, for forward hooks

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict:
        node = cfg.MODEL.FCOS
        return {
            **detector_arguments(cfg, "FCOS", cls.head_class),
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        }

    def forward_training(self, images, features, predictions, gt_instances) -> Dict[str, Tensor]:
        visualize_predictions(self, images, features, predictions, gt_instances)
        return super().forward_training(images, features, predictions, gt_instances)

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ) -> Dict[str, Tensor]:
        # In half precision release 0.6 decodes boxes that its IoU loss cannot take.
        predicted = (pred_logits, pred_anchor_deltas, pred_centerness)
        logits, deltas, centerness = ([as_float(x) for x in levels] for levels in predicted)
        return super().losses(anchors, logits, gt_labels, deltas, gt_boxes, centerness)

    @torch.no_grad()
    def label_anchors(self, anchors: List[Boxes], gt_instances: List[Instances]) -> Tuple:
        # Release 0.6 fails on an image without boxes; a box of no size matches no location.
        targets = [_at_least_one_box(x) for x in gt_instances]
        return self.assigned(super().label_anchors(anchors, targets))


def _at_least_one_box(instances: Instances) -> Instances:
    if len(instances) > 0:
        return instances
    boxes = instances.gt_boxes.tensor
    return Instances(
        instances.image_size,
        gt_boxes=Boxes(boxes.new_zeros(1, 4)),
        gt_classes=instances.gt_classes.new_zeros(1),
    )

"""What ATSS and GFL have in common: one square anchor per location, chosen by the ATSS rule.

Shapes: N images, R anchors of all levels, K classes.
"""

from typing import Dict, List, Optional, Tuple

import torch
from detectron2.modeling import Backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from d2kd.layers import mean_over_gpus

from .assign import assign_atss, assigned_targets
from .inference import detect, float_predictions
from .visualize import visualize_predictions

# Width of the anchors, in strides (ATSS, section 3)
ANCHOR_SCALE = 8


class SingleAnchorDetector(DenseDetector):
    """Base of ATSS and GFL. A subclass gives :meth:`losses`."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Optional[List[str]] = None,
        box2box_transform,
        num_classes: int,
        box_loss_weight: float = 2.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: Tuple[float, ...],
        pixel_std: Tuple[float, ...],
        vis_period: int = 0,
        input_format: str = "BGR",
    ):
        """
        Args:
            head: a :class:`~d2kd.modeling.meta_arch.scaled_head.ScaledHead`.
            box2box_transform: codes boxes relative to anchors.
            box_loss_weight: weight of the GIoU loss.
            vis_period: iterations between two pictures of predictions; 0 for none.
            Other arguments mean the same as in Detectron2's ``RetinaNet``.
        """
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[ANCHOR_SCALE * s] for s in strides],
            aspect_ratios=[1.0],
            strides=strides,
            offset=0.0,
        )
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.box_loss_weight = box_loss_weight
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.vis_period = vis_period
        self.input_format = input_format
        self.assigned = nn.Identity()  # what label_anchors gives passes here, for forward hooks

    def forward_training(self, images, features, predictions, gt_instances) -> Dict[str, Tensor]:
        visualize_predictions(self, images, features, predictions, gt_instances)
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(
            Boxes.cat(anchors).tensor,
            torch.stack(gt_labels),
            torch.stack(gt_boxes),
            *[torch.cat(float_predictions(levels), dim=1) for levels in predictions],
        )

    @torch.no_grad()
    def label_anchors(
        self, anchors: List[Boxes], gt_instances: List[Instances]
    ) -> Tuple[List[Tensor], List[Tensor]]:
        """As in Detectron2's ``RetinaNet``, by the ATSS rule.

        Args:
            anchors: per level.
            gt_instances: per image.

        Returns:
            labels (R,) per image in {-1, 0, ..., K}: K is background, -1 ignored because the
            anchor lies in what pads the image; boxes (R, 4) per image, zeros but for positives.
        """
        labels, boxes = [], []
        for gt in gt_instances:
            valid = self._valid_anchors(anchors, gt.image_size)
            index = assign_atss([x.tensor for x in anchors], valid, gt.gt_boxes.tensor)
            labels_i, boxes_i = assigned_targets(index, gt, self.num_classes)
            labels.append(labels_i.masked_fill(~valid, -1))
            boxes.append(boxes_i)
        return self.assigned((labels, boxes))

    def _valid_anchors(self, anchors: List[Boxes], image_size: Tuple[int, int]) -> Tensor:
        """Anchors whose centre lies in the image, grown to a multiple of what the backbone asks
        for (and not of what the largest image of the batch asks for)."""
        divisor = max(self.backbone.size_divisibility, 1)
        height, width = (-(-side // divisor) * divisor for side in image_size)
        x, y = Boxes.cat(anchors).get_centers().unbind(dim=1)
        return (x < width) & (y < height)

    def losses(
        self, anchors: Tensor, gt_labels: Tensor, gt_boxes: Tensor, *predictions: Tensor
    ) -> Dict[str, Tensor]:
        """
        Args:
            anchors: (R, 4).
            gt_labels, gt_boxes: (N, R), (N, R, 4), see :meth:`label_anchors`.
            predictions: (N, R, D) each, in the order of the head's outputs.

        Returns:
            the losses by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must define its losses")

    def normalizers(self, positive: Tensor, weights: Tensor) -> Tensor:
        """Number of positives and sum of box weights, averaged over GPUs in one communication.

        Args:
            positive: (N, R); every image counts as one positive at least.
            weights: (N, R) of the box loss.

        Returns:
            (2,), at least 1 each.
        """
        count = positive.sum(dim=1).clamp(min=1).sum()
        return mean_over_gpus(torch.stack((count.float(), weights.sum()))).clamp(min=1)

    def forward_inference(
        self, images: ImageList, features: List[Tensor], predictions: List[List[Tensor]]
    ) -> List[Instances]:
        return detect(self, images, features, predictions)

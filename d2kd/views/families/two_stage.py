"""Two-stage detectors: Detectron2's ``GeneralizedRCNN``. Their RPN counts as a dense head."""

from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn

from d2kd.layers import flatten_scalars

from .box_head import BoxHead
from .dense_head import DenseHead
from .family import FAMILY_REGISTRY, Family, cell_shapes, refuse_rotated


@FAMILY_REGISTRY.register()
class TwoStageFamily(Family):
    """Faster, Mask and Cascade R-CNN."""

    def __init__(self, detector: nn.Module):
        super().__init__(detector)
        rpn = detector.proposal_generator
        refuse_rotated(detector, rpn.box2box_transform)
        self.dense_head = DenseHead(
            rpn.rpn_head,
            num_anchors=rpn.anchor_generator.num_anchors[0],
            num_classes=1,
            box_coding=rpn.box2box_transform,
        )
        self.dense_head.class_agnostic = True
        # Others, such as the C4 models' RoI heads, have no box head to ask.
        if isinstance(detector.roi_heads, StandardROIHeads):
            self.box_head = BoxHead(detector.roi_heads)

    @classmethod
    def accepts(cls, detector: nn.Module) -> bool:
        return isinstance(detector, GeneralizedRCNN) and isinstance(
            detector.proposal_generator, RPN
        )

    @property
    def anchor_shapes(self) -> Tuple[Tuple[float, ...], ...]:
        return cell_shapes(self.detector.proposal_generator.anchor_generator)

    @property
    def not_distilled(self) -> List[str]:
        roi_heads = self.detector.roi_heads
        heads = {
            "mask head": getattr(roi_heads, "mask_on", False),
            "keypoint head": getattr(roi_heads, "keypoint_on", False),
            "semantic head": hasattr(self.detector, "sem_seg_head"),
        }
        return [name for name, there in heads.items() if there]

    @property
    def num_classes(self) -> int:
        return self.detector.roi_heads.num_classes

    @property
    def level_names(self) -> List[str]:
        return list(self.detector.proposal_generator.in_features)

    @torch.no_grad()
    def propose(
        self,
        features: Dict[str, Tensor],
        outputs: Sequence[List[Tensor]],
        image_sizes: List[Tuple[int, int]],
    ) -> List[Instances]:
        """The RPN's proposals with the settings of training, whatever mode the detector is in.

        Args:
            features: FPN levels by name.
            outputs: what the RPN's head returned, (objectness, deltas) per level.
            image_sizes: (height, width) per image before padding.
        """
        rpn = self.detector.proposal_generator
        anchors = rpn.anchor_generator([features[name] for name in rpn.in_features])
        objectness, deltas = outputs
        box_dim = deltas[0].shape[1] // self.dense_head.num_anchors
        deltas = [permute_to_N_HWA_K(x, box_dim) for x in deltas]
        return find_top_rpn_proposals(
            rpn._decode_proposals(anchors, deltas),
            [flatten_scalars(x) for x in objectness],
            image_sizes,
            rpn.nms_thresh,
            rpn.pre_nms_topk[True],
            rpn.post_nms_topk[True],
            rpn.min_box_size,
            training=True,
        )

"""Two-stage detectors: Detectron2's ``GeneralizedRCNN``. Their RPN counts as a dense head."""

from typing import Dict, FrozenSet, List, Sequence, Tuple

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn

from .box_head import BoxHead
from .dense_head import DenseHead
from .family import FAMILY_REGISTRY, Family


@FAMILY_REGISTRY.register()
class TwoStageFamily(Family):
    """Faster, Mask and Cascade R-CNN."""

    architectures = ("GeneralizedRCNN",)

    def __init__(self, detector: nn.Module):
        super().__init__(detector)
        self.offers = frozenset({"stages", "features", "dense"})
        # Others, such as the C4 models' RoI heads, have no box head to ask.
        if isinstance(detector.roi_heads, StandardROIHeads):
            self.offers |= {"proposals", "rois"}
            self.box_head = BoxHead(detector.roi_heads)

    def build_dense_head(self) -> DenseHead:
        rpn = self.detector.proposal_generator
        return DenseHead(
            rpn.rpn_head,
            num_anchors=rpn.anchor_generator.num_anchors[0],
            num_classes=1,
            box_coding=rpn.box2box_transform,
        )

    def level_names(self) -> List[str]:
        return list(self.detector.proposal_generator.in_features)

    @property
    def num_classes(self) -> int:
        return self.detector.roi_heads.num_classes

    def taps(self, needs: FrozenSet[str]) -> Dict[str, nn.Module]:
        taps = super().taps(needs)
        if needs & {"proposals", "rois"}:
            taps["head"] = self.dense_head.module  # a teacher's proposals are made of its outputs
            taps.update(self.box_head.taps())
        return taps

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
        return find_top_rpn_proposals(
            rpn._decode_proposals(anchors, [permute_to_N_HWA_K(x, 4) for x in deltas]),
            [permute_to_N_HWA_K(x, 1).squeeze(2) for x in objectness],
            image_sizes,
            rpn.nms_thresh,
            rpn.pre_nms_topk[True],
            rpn.post_nms_topk[True],
            rpn.min_box_size,
            training=True,
        )

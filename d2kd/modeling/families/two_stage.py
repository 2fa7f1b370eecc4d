"""Two-stage detectors: Detectron2's ``GeneralizedRCNN``. Their RPN counts as a dense head."""

from typing import List

from .dense_head import DenseHead
from .family import FAMILY_REGISTRY, Family


@FAMILY_REGISTRY.register()
class TwoStageFamily(Family):
    """Faster, Mask and Cascade R-CNN."""

    architectures = ("GeneralizedRCNN",)
    offers = frozenset({"stages", "features", "dense"})

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

"""Dense detectors: RetinaNet, FCOS, and others on Detectron2's ``DenseDetector``."""

from typing import List

from .dense_head import TowerHead
from .family import FAMILY_REGISTRY, Family


@FAMILY_REGISTRY.register()
class DenseFamily(Family):
    """One-stage detectors, with anchor boxes or points."""

    architectures = ("RetinaNet", "FCOS", "ATSS", "GFL")
    offers = frozenset({"stages", "features", "dense", "tower"})

    def build_dense_head(self) -> TowerHead:
        detector = self.detector
        return TowerHead(
            detector.head,
            num_anchors=detector.head.cls_score.out_channels // detector.num_classes,
            num_classes=detector.num_classes,
            box_coding=detector.box2box_transform,
        )

    def level_names(self) -> List[str]:
        return list(self.detector.head_in_features)

"""Dense detectors: RetinaNet, FCOS, and others on Detectron2's ``DenseDetector``."""

from typing import List

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .assignment import Assignment
from .dense_head import TowerHead
from .family import FAMILY_REGISTRY, Family


@FAMILY_REGISTRY.register()
class DenseFamily(Family):
    """One-stage detectors, with anchor boxes or points."""

    architectures = ("RetinaNet", "FCOS", "ATSS", "GFL")
    offers = frozenset({"stages", "features", "dense", "tower", "tower_statistics", "assignment"})

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

    def anchors(self, features: List[Tensor]) -> List[Boxes]:
        """The anchors, or boxes around the points, of each level.

        Args:
            features: per level (..., h, w), of which only the size matters.

        Returns:
            per level, in pixels, in the order (row, column, anchor).
        """
        return self.detector.anchor_generator(features)

    def decode(self, deltas: List[Tensor], anchors: List[Boxes]) -> Tensor:
        """
        Args:
            deltas: raw box predictions, (N, A·R, h, w) per level.
            anchors: per level.

        Returns:
            (N, R, 4) boxes in pixels, R anchors of all levels; not clipped to the image.
        """
        flat = [permute_to_N_HWA_K(x, self.dense_head.box_dim) for x in deltas]
        flat = torch.cat(flat, dim=1).float()
        anchors = Boxes.cat(anchors).tensor.expand(len(flat), -1, -1)
        boxes = self.detector.box2box_transform.apply_deltas(
            flat.flatten(0, 1), anchors.flatten(0, 1)
        )
        return boxes.view_as(anchors)

    @torch.no_grad()
    def assign(self, anchors: List[Boxes], targets: List[Instances]) -> Assignment:
        """Applies the detector's own rule once more; it is cheap and has no randomness.

        Args:
            anchors: per level.
            targets: ground truth per image.
        """
        labels, boxes = self.detector.label_anchors(anchors, targets)
        # FCOS of release 0.6 gives Boxes.
        boxes = torch.stack([b.tensor if isinstance(b, Boxes) else b for b in boxes])
        centers = Boxes.cat(anchors).get_centers()
        inside = (centers < self._padded_sizes(targets, centers)).all(dim=2)
        return Assignment(
            sizes=[len(x) for x in anchors],
            centers=centers,
            labels=torch.stack(labels).masked_fill(~inside, -1),
            boxes=boxes,
            num_classes=self.num_classes,
        )

    def _padded_sizes(self, targets: List[Instances], like: Tensor) -> Tensor:
        """(N, 1, 2) width and height of each image, padded as if it were alone in the batch."""
        grid = max(self.detector.backbone.size_divisibility, 1)
        sizes = [[-(-side // grid) * grid for side in x.image_size[::-1]] for x in targets]
        return torch.tensor(sizes, dtype=like.dtype).to(like.device, non_blocking=True)[:, None]

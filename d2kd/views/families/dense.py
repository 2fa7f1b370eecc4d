"""Dense detectors: RetinaNet, FCOS, and others on Detectron2's ``DenseDetector``."""

from typing import List, Optional, Tuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.meta_arch import RetinaNet, fcos
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from d2kd.modeling.meta_arch.integral import IntegralBoxTransform
from d2kd.modeling.meta_arch.single_anchor import SingleAnchorDetector

from ..reads import Assignment
from ..recorder import Observed, Recorder
from .assignment import AnchorTargets
from .dense_head import TowerHead
from .family import FAMILY_REGISTRY, Family, cell_shapes, refuse_rotated

# What DenseFamily asks of a detector, and takes apart of its head
_PARTS = ("num_classes", "anchor_generator", "box2box_transform", "label_anchors")
_HEAD_PARTS = ("cls_subnet", "bbox_subnet", "cls_score", "bbox_pred")


@FAMILY_REGISTRY.register()
class DenseFamily(Family):
    """One-stage detectors, with anchor boxes or points."""

    def __init__(self, detector: nn.Module):
        super().__init__(detector)
        refuse_rotated(detector, detector.box2box_transform)
        self.dense_head = TowerHead(
            detector.head,
            num_anchors=detector.head.cls_score.out_channels // detector.num_classes,
            num_classes=detector.num_classes,
            box_coding=detector.box2box_transform,
        )

    @classmethod
    def accepts(cls, detector: nn.Module) -> bool:
        head = getattr(detector, "head", None)
        return (
            isinstance(detector, DenseDetector)
            and all(hasattr(head, x) for x in _HEAD_PARTS)
            and all(hasattr(detector, x) for x in _PARTS)
        )

    @property
    def num_classes(self) -> int:
        return self.detector.num_classes

    @property
    def level_names(self) -> List[str]:
        return list(self.detector.head_in_features)

    @property
    def box_form(self) -> str:
        """As in :class:`Family`; the name of the class that decodes boxes if it is another."""
        forms = {
            IntegralBoxTransform: "distribution",
            Box2BoxTransformLinear: "distances",
            Box2BoxTransform: "deltas",
        }
        transform = self.detector.box2box_transform
        return forms.get(type(transform), type(transform).__name__)

    @property
    def normalizer(self) -> str:
        kinds = {
            RetinaNet: "num_positive",
            SingleAnchorDetector: "mean_num_positive",
            fcos.FCOS: "mean_sum_centerness",
        }
        return next((n for kind, n in kinds.items() if isinstance(self.detector, kind)), "")

    @property
    def ignores_anchors(self) -> bool:
        return not isinstance(self.detector, fcos.FCOS)

    @property
    def anchor_shapes(self) -> Tuple[Tuple[float, ...], ...]:
        return cell_shapes(self.detector.anchor_generator)

    @property
    def has_assignment(self) -> bool:
        return True

    def anchors(self, features: List[Tensor]) -> List[Boxes]:
        """The anchors, or boxes around the points, of each level.

        Args:
            features: per level (..., h, w), of which only the size matters.

        Returns:
            per level, in pixels, in the order (row, column, anchor).
        """
        # Detectron2's main branch makes them on the default device, and would copy from the CPU
        with torch.device(features[0].device):
            return self.detector.anchor_generator(features)

    def decode(self, deltas: List[Tensor], anchors: List[Boxes]) -> Tensor:
        """
        Args:
            deltas: raw box predictions, (N, A·D, h, w) per level, D numbers per anchor.
            anchors: per level.

        Returns:
            (N, R, 4) boxes in pixels, R anchors of all levels; not clipped to the image.
        """
        size = deltas[0].shape[1] // self.dense_head.num_anchors
        flat = torch.cat([permute_to_N_HWA_K(x, size) for x in deltas], dim=1).float()
        anchors = Boxes.cat(anchors).tensor.expand(len(flat), -1, -1)
        boxes = self.detector.box2box_transform.apply_deltas(
            flat.flatten(0, 1), anchors.flatten(0, 1)
        )
        return boxes.view_as(anchors)

    def _observe_assignment(self, read: Assignment) -> List[Observed]:
        observed = super()._observe_assignment(read)
        return observed if self._assigned is None else [*observed, Observed(self._assigned)]

    @property
    def _assigned(self) -> Optional[nn.Module]:
        """What labels pass through in the detectors of d2kd.modeling.meta_arch."""
        return getattr(self.detector, "assigned", None)

    def recorded_assignment(
        self, recorder: Recorder, anchors: List[Boxes], targets: List[Instances]
    ) -> AnchorTargets:
        calls = [] if self._assigned is None else recorder.calls(self._assigned)
        if not calls:
            return self.assign(anchors, targets)
        return self._anchor_targets(*calls[0].output, anchors, targets)

    def assign(self, anchors: List[Boxes], targets: List[Instances]) -> AnchorTargets:
        """Applies the detector's own rule once more, which has no randomness. Of Detectron2's
        RetinaNet there is no other way: what it computes for its own losses passes no module.

        Args:
            anchors: per level.
            targets: ground truth per image.
        """
        return self._anchor_targets(
            *self.detector.label_anchors(anchors, targets), anchors, targets
        )

    @torch.no_grad()
    def _anchor_targets(
        self,
        labels: List[Tensor],
        boxes: List[Tensor],
        anchors: List[Boxes],
        targets: List[Instances],
    ) -> AnchorTargets:
        # FCOS of release 0.6 gives Boxes.
        boxes = torch.stack([b.tensor if isinstance(b, Boxes) else b for b in boxes])
        centers = Boxes.cat(anchors).get_centers()
        # Centres on the border come out a little below it: 63.99999 for 64.
        inside = (centers + 0.5 < self._padded_sizes(targets, centers)).all(dim=2)
        return AnchorTargets(
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

"""The second stage of a two-stage detector: its proposals, and what its box head makes of boxes.

Shapes: N images, R boxes of all the images together, C channels, K classes.
"""

from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.cascade_rcnn import _ScaleGradient
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from d2kd.errors import UserError

from ..recorder import Recorder
from .transfer import copy_weights


class RoIs(NamedTuple):
    """What a box head makes of R boxes, in the order of images and boxes."""

    features: Tensor  # (R, C, 7, 7), pooled from the FPN
    hidden: Tensor  # (R, D), the box head's output, which the predictor reads
    logits: Tensor  # (R, K + 1), background last
    deltas: Tensor  # (R, 4 K), or (R, 4) if class-agnostic
    pre_activation: Optional[Tensor] = None  # (R, D), hidden before the last ReLU


class BoxHead:
    """Pooler, box head and predictor of Detectron2's ``StandardROIHeads``, or of one stage of
    ``CascadeROIHeads``. Stages are counted from 0; other detectors have only that one.

    Attributes:
        module: the RoI heads.
        num_stages: how many box heads follow each other.
    """

    def __init__(self, module: StandardROIHeads):
        self.module = module
        self.num_stages: int = getattr(module, "num_cascade_stages", 1)
        self._cascade = hasattr(module, "num_cascade_stages")

    def head(self, stage: int) -> nn.Module:
        """The layers from pooled features to the hidden vector."""
        return self.module.box_head[stage] if self._cascade else self.module.box_head

    def predictor(self, stage: int) -> nn.Module:
        """The layers from the hidden vector to logits and deltas."""
        return self.module.box_predictor[stage] if self._cascade else self.module.box_predictor

    def hidden_dim(self, stage: int) -> int:
        """D, the length of a stage's hidden vector."""
        shape = self.head(stage).output_shape
        return shape.channels * (shape.height or 1) * (shape.width or 1)

    def last_fc(self, stage: int) -> Optional[nn.Linear]:
        """The last fully connected layer of a stage's box head, which has none if it ends in
        convolutions."""
        fcs = [m for m in self.head(stage).modules() if isinstance(m, nn.Linear)]
        return fcs[-1] if fcs else None

    @property
    def batch_size_per_image(self) -> int:
        """How many boxes of an image are sampled for training."""
        return self.module.batch_size_per_image

    def delta_weights(self, stage: int) -> Tuple[float, ...]:
        """What a stage multiplies the four box deltas by, ``BBOX_REG_WEIGHTS``."""
        return tuple(self.predictor(stage).box2box_transform.weights)

    def copy_from(self, teacher: "BoxHead", key: str) -> None:
        """Fills the box head and the predictor of every stage with the teacher's.

        Raises:
            UserError: if the teacher has fewer stages, or other shapes.
        """
        if teacher.num_stages < self.num_stages:
            raise UserError(
                f"{key} copies box heads of the teacher, which has {teacher.num_stages}, but the "
                f"student has {self.num_stages}: take a Cascade R-CNN, or set {key} to False"
            )
        for stage in range(self.num_stages):
            copy_weights(self.head(stage), teacher.head(stage), key)
            copy_weights(self.predictor(stage), teacher.predictor(stage), key)

    def taps(self) -> Dict[str, nn.Module]:
        """The modules to observe for :meth:`recorded`."""
        taps = {"roi_heads": self.module, "box_pooler": self.module.box_pooler}
        for stage in range(self.num_stages):
            taps.update(self._head_taps(stage))
            taps[f"box_predictor.{stage}"] = self.predictor(stage)
        return taps

    def _head_taps(self, stage: int) -> Dict[str, nn.Module]:
        taps = {f"box_head.{stage}": self.head(stage), f"last_fc.{stage}": self.last_fc(stage)}
        return {name: module for name, module in taps.items() if module is not None}

    def recorded(self, calls: Dict[str, List[Tuple]]) -> List[Tuple[List[Boxes], RoIs]]:
        """The boxes that each stage saw in an observed forward, and what it made of them.

        Args:
            calls: (inputs, output) of every call of the modules in :meth:`taps`.
        """
        stages = []
        for stage, ((_, boxes), features) in enumerate(calls["box_pooler"]):
            _, outputs = calls[f"box_predictor.{stage}"][0]
            stages.append((boxes, self._rois(features, outputs, calls, stage)))
        return stages

    def _rois(self, features: Tensor, outputs: Tuple, calls: Dict, stage: int) -> RoIs:
        _, hidden = calls[f"box_head.{stage}"][0]
        pre_activation = calls[f"last_fc.{stage}"][0][1] if self.last_fc(stage) else None
        return RoIs(features, hidden.flatten(1), *outputs, pre_activation)

    def recorded_proposals(self, calls: Dict[str, List[Tuple]], stage: int) -> List[Instances]:
        """The labelled boxes that a stage was trained on in an observed forward, per image.

        Args:
            calls: as for :meth:`recorded`.
            stage: which of the box heads.
        """
        (_, _, _, targets), (sampled, _) = calls["roi_heads"][0]
        (_, boxes), _ = calls["box_pooler"][stage]
        # Detectron2 may have overwritten the boxes in its proposals: these are what the head saw.
        fields = [p.get_fields() if stage == 0 else {} for p in sampled]
        proposals = [
            Instances(p.image_size, **{**f, "proposal_boxes": b})
            for p, f, b in zip(sampled, fields, boxes)
        ]
        return proposals if stage == 0 else self.label(proposals, targets, stage)

    def run(self, features: Dict[str, Tensor], boxes: List[Boxes], stage: int) -> RoIs:
        """Pools boxes and runs one stage's head on them, with gradient where there is one.

        Args:
            features: FPN levels by name.
            boxes: per image, in pixels of the padded batch.
            stage: which of the box heads.
        """
        levels = [features[name] for name in self.module.box_in_features]
        pooled = shared = self.module.box_pooler(levels, boxes)
        if self._cascade and self.module.training:  # as in the cascade's own training
            shared = _ScaleGradient.apply(pooled, 1.0 / self.num_stages)
        with Recorder(self._head_taps(stage)) as recorder:
            outputs = self.predictor(stage)(self.head(stage)(shared))
        return self._rois(pooled, outputs, recorder.calls, stage)

    @torch.no_grad()
    def sample(
        self,
        features: Dict[str, Tensor],
        proposals: List[Instances],
        targets: List[Instances],
        stage: int,
    ) -> List[Instances]:
        """Matches a teacher's proposals with the ground truth and samples them as in training, and
        takes them through the cascade up to a stage.

        Args:
            features: FPN levels by name.
            proposals: of the RPN, per image.
            targets: ground truth per image.
            stage: the stage that the boxes are for.

        Returns:
            per image, with ``proposal_boxes``, ``gt_classes`` (K = background), and ``gt_boxes``
            where there is ground truth.
        """
        with get_event_storage().name_scope("teacher"):  # apart from the student's numbers
            proposals = self.module.label_and_sample_proposals(proposals, targets)
        for k in range(stage):
            boxes = [p.proposal_boxes for p in proposals]
            rois = self.run(features, boxes, k)
            refined = self.predictor(k).predict_boxes((rois.logits, rois.deltas), proposals)
            sizes = [p.image_size for p in proposals]
            proposals = self.module._create_proposals_from_boxes(refined, sizes)
            proposals = self.label(proposals, targets, k + 1)
        return proposals

    def label(
        self, proposals: List[Instances], targets: List[Instances], stage: int
    ) -> List[Instances]:
        """Gives boxes the labels of a later stage's training, by its own IoU threshold."""
        with EventStorage():  # Detectron2 has logged these numbers already
            return self.module._match_and_label_boxes(proposals, stage, targets)

    def check_stage(self, stage: int, key: str, name: str) -> None:
        """
        Raises:
            UserError: if there is no such stage in the detector of this name.
        """
        if not 0 <= stage < self.num_stages:
            raise UserError(
                f"{key} is {stage}, but {name} has {self.num_stages} box head(s): give "
                f"0 ... {self.num_stages - 1}"
            )

    def check_same_outputs(self, teacher: "BoxHead", stage: int, key: str) -> None:
        """
        Raises:
            UserError: if the class logits or box deltas of a stage do not mean the same in both.
        """
        self.check_same_classes(teacher, stage, key)
        ours, theirs = self.delta_weights(stage), teacher.delta_weights(stage)
        if ours != theirs:
            raise UserError(
                f"{key} compares box heads: BBOX_REG_WEIGHTS is {ours} of the student and {theirs} "
                f"of the teacher; take a teacher with the same, or set {key} to 0"
            )

    def check_same_classes(self, teacher: "BoxHead", stage: int, key: str) -> None:
        """
        Raises:
            UserError: if the class logits of a stage do not mean the same in both.
        """
        ours, theirs = self._classes(stage), teacher._classes(stage)
        if ours != theirs:
            raise UserError(
                f"{key} compares box heads: the student's predicts {ours}, the teacher's {theirs}; "
                f"take a teacher with the same classes, or set {key} to 0"
            )

    def _classes(self, stage: int) -> str:
        sigmoid = getattr(self.predictor(stage), "use_sigmoid_ce", False)
        return f"{self.module.num_classes} classes ({'sigmoid' if sigmoid else 'softmax'})"

"""The second stage of a two-stage detector: its proposals, and what its box head makes of boxes.

Shapes: N images, R boxes of all the images together, C channels, K classes.
"""

from typing import Dict, List, Optional, Tuple

import torch
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.cascade_rcnn import _ScaleGradient
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from d2kd.errors import UserError
from d2kd.layers import as_float

from ..reads import Regions
from ..recorder import Observed, Recorder
from ..regions import RegionOutputs


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

    @property
    def pooled_size(self) -> Tuple[int, int]:
        """Height and width of a pooled region."""
        return self.module.box_pooler.output_size

    @property
    def coarsest_stride(self) -> int:
        """Of the levels that regions are pooled from."""
        return 2**self.module.box_pooler.max_level

    def strides_of(self, boxes: List[Boxes]) -> Tensor:
        """Of the level that each box is pooled from, (R,) int64, R boxes of all images."""
        pooler = self.module.box_pooler
        levels = assign_boxes_to_levels(
            boxes,
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
        return 2 ** (levels + pooler.min_level)

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
            _copy_weights(self.head(stage), teacher.head(stage), key)
            _copy_weights(self.predictor(stage), teacher.predictor(stage), key)

    def observe_proposals(self) -> List[Observed]:
        """The modules to observe for :meth:`recorded_proposals`."""
        return [Observed(self.module, inputs=True), Observed(self.module.box_pooler, inputs=True)]

    def observe(self, read: Regions) -> List[Observed]:
        """The modules to observe for :meth:`recorded`."""
        observed = [Observed(self.module.box_pooler, inputs=True)]
        return observed + (self._observe_head(read.stage) if read.runs_head else [])

    def _observe_head(self, stage: int) -> List[Observed]:
        modules = [self.head(stage), self.predictor(stage), self.last_fc(stage)]
        return [Observed(module) for module in modules if module is not None]

    def recorded_proposals(self, recorder: Recorder, stage: int) -> List[Instances]:
        """The labelled boxes that a stage was trained on in an observed forward, per image.

        Args:
            recorder: of the modules of :meth:`observe_proposals`.
            stage: which of the box heads.
        """
        (_, _, _, targets), (sampled, _) = recorder.calls(self.module)[0]
        (_, boxes), _ = recorder.calls(self.module.box_pooler)[stage]
        # Detectron2 may have overwritten the boxes in its proposals: these are what the head saw.
        fields = [p.get_fields() if stage == 0 else {} for p in sampled]
        proposals = [
            Instances(p.image_size, **{**f, "proposal_boxes": b})
            for p, f, b in zip(sampled, fields, boxes)
        ]
        return proposals if stage == 0 else self.label(proposals, targets, stage)

    def recorded(self, recorder: Recorder, stage: int) -> RegionOutputs:
        """What a stage made of the boxes of :meth:`recorded_proposals`, as far as it was observed.

        Args:
            recorder: of the modules of :meth:`observe`.
            stage: which of the box heads.
        """
        pooled = recorder.calls(self.module.box_pooler)[stage].output
        return self._outputs(pooled, recorder, stage)

    def _outputs(self, pooled: Tensor, recorder: Recorder, stage: int) -> RegionOutputs:
        if not recorder.calls(self.head(stage)):
            return RegionOutputs(pooled)
        logits, deltas = recorder.output(self.predictor(stage))
        last_fc = self.last_fc(stage)
        return RegionOutputs(
            pooled,
            recorder.output(self.head(stage)).flatten(1),
            logits,
            deltas,
            recorder.output(last_fc) if last_fc is not None else None,
        )

    def run(
        self,
        features: Dict[str, Tensor],
        boxes: List[Boxes],
        read: Regions,
        pooled: Optional[Tensor] = None,
    ) -> RegionOutputs:
        """Pools boxes and runs one stage's head on them as far as asked, with gradient where there
        is one.

        Args:
            features: FPN levels by name.
            boxes: per image, in pixels of the padded batch.
            read: what is asked, of which stage.
            pooled: the RoI features of these boxes, where they are there already.
        """
        if pooled is None:
            # In half precision Detectron2 would round the boxes as well, by pixels
            levels = [as_float(features[name]) for name in self.module.box_in_features]
            pooled = self.module.box_pooler(levels, boxes)
        if not read.runs_head:
            return RegionOutputs(pooled)
        shared = pooled
        if self._cascade and self.module.training:  # as in the cascade's own training
            shared = _ScaleGradient.apply(pooled, 1.0 / self.num_stages)
        with Recorder(self._observe_head(read.stage)) as recorder:
            self.predictor(read.stage)(self.head(read.stage)(shared))
        return self._outputs(pooled, recorder, read.stage)

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
        # Masks and keypoints would be gathered for every proposal, and not be looked at
        targets = [
            Instances(t.image_size, gt_boxes=t.gt_boxes, gt_classes=t.gt_classes) for t in targets
        ]
        with get_event_storage().name_scope("teacher"):  # apart from the student's numbers
            proposals = self.module.label_and_sample_proposals(proposals, targets)
        for k in range(stage):
            boxes = [p.proposal_boxes for p in proposals]
            outputs = self.run(features, boxes, Regions(predictions=True, stage=k))
            refined = self.predictor(k).predict_boxes((outputs.logits, outputs.deltas), proposals)
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

    def check_same_classes(self, teacher: "BoxHead", stage: int, key: str) -> None:
        """
        Raises:
            UserError: if the class logits of a stage do not mean the same in both.
        """
        for side, head in (("student", self), ("teacher", teacher)):
            if getattr(head.predictor(stage), "use_sigmoid_ce", False):
                raise UserError(
                    f"{key} compares distributions of classes, but the box head of the {side} "
                    "scores each class by itself (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE): set it to "
                    "False there, or set the weight to 0"
                )
        ours, theirs = self.module.num_classes, teacher.module.num_classes
        if ours != theirs:
            raise UserError(
                f"{key} compares box heads: the student's predicts {ours} classes, the teacher's "
                f"{theirs}; take a teacher with the same classes, or set {key} to 0"
            )


@torch.no_grad()
def _copy_weights(student: nn.Module, teacher: nn.Module, key: str) -> None:
    """Fills a part of the student with the same part of the teacher. Both go their own ways after.

    Args:
        student, teacher: modules with the same names and shapes.
        key: config key that asks for it, for messages.

    Raises:
        UserError: if a name or a shape differs.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name in {**ours, **theirs}:
        shapes = [tuple(x[name].shape) if name in x else None for x in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{key} copies weights of the teacher, but '{name}' has shape {shapes[0]} in the "
                f"student and {shapes[1]} in the teacher: take the same head, or set {key} to False"
            )
    student.load_state_dict(theirs)

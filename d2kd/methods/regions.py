"""The regions on which a teacher and a student are compared, and the student's vectors of them.

Shapes: R regions of all images, D numbers per vector.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2kd.methods.dense_rois import DenseSampling, dense_rois, vectors_of
from d2kd.methods.distiller import Needs
from d2kd.methods.gt_jitter import jittered_objects


class Regions(NamedTuple):
    """The boxes of one step, per image."""

    boxes: List[Boxes]
    classes: List[Tensor]  # K = background
    anchors: Optional[List[Tensor]] = None  # of a dense student: which of its anchors made them


def hidden_vectors(view, boxes: List[Boxes], pre_relu: bool) -> Tensor:
    """(R, D), what the box head of a two-stage detector makes of boxes."""
    rois = view.rois(boxes)
    return rois.pre_activation if pre_relu else rois.hidden


class TwoStageRegions:
    """Regions of a two-stage student, and what its box head makes of them."""

    def __init__(self, source: str = "student", jitter_count: int = 0, pre_relu: bool = False):
        """
        Args:
            source: student or teacher, whose sampled proposals the regions are, or gt_jitter, for
                boxes around objects.
            jitter_count: how many of these an image with objects has.
            pre_relu: vectors before the last ReLU.
        """
        self.source = source
        self.jitter_count = jitter_count
        self.pre_relu = pre_relu

    def needs(self, term: str) -> Needs:
        ours = ("proposals",) if self.source == "student" else ()
        theirs = ("proposals",) if self.source == "teacher" else ()
        return Needs(student=("features", *ours, "rois"), teacher=(*theirs, "rois"))

    def sample(self, student, teacher, targets: List[Instances]) -> List[Instances]:
        """Per image ``proposal_boxes`` and ``gt_classes``."""
        if self.source == "gt_jitter":
            return [jittered_objects(target, self.jitter_count) for target in targets]
        return {"student": student, "teacher": teacher}[self.source].proposals

    def vectors(self, student, regions: Regions) -> Tuple[Tensor, None]:
        """(R, D), with gradient."""
        return hidden_vectors(student, regions.boxes, self.pre_relu), None


class DenseRegions:
    """Regions of a dense student, boxes that it predicts, and what its class tower holds where they
    were predicted."""

    def __init__(self, sampling: DenseSampling, num_blocks: int, pre_relu: bool = False):
        """
        Args:
            sampling: which boxes.
            num_blocks: of the class tower.
            pre_relu: vectors before the last ReLU.
        """
        self.sampling = sampling
        self.num_blocks = num_blocks
        self.pre_relu = pre_relu

    def needs(self, term: str) -> Needs:
        pre = ".pre" if self.pre_relu else ""
        tower = (f"tower.{self.num_blocks}{pre}",) if term == "ckd" else ()
        return Needs(student=("features", "dense", *tower), teacher=("rois",))

    def sample(self, student, teacher, targets: List[Instances]) -> List[Instances]:
        """Per image ``proposal_boxes``, ``gt_classes`` and ``anchors``."""
        return dense_rois(student, targets, self.sampling)

    def vectors(self, student, regions: Regions) -> Tuple[Tensor, Tensor]:
        """(R, D), with gradient, and (R,) the number of the anchor at its location."""
        num_anchors = student.family.dense_head.num_anchors
        tower = student.dense.tower("cls", self.num_blocks, self.pre_relu)
        vectors = vectors_of(tower, regions.anchors, num_anchors)
        return vectors, torch.cat(regions.anchors) % num_anchors

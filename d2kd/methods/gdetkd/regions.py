"""The regions on which a teacher and a student are compared, and the student's vectors of them.

Shapes: R regions of all images, D numbers per vector.
"""

from typing import List, Tuple

from detectron2.structures import Instances
from torch import Tensor

from d2kd.views import (
    Dense,
    Proposals,
    Read,
    Regions,
    RegionSet,
    StudentView,
    TeacherView,
    Tower,
    View,
)

from .dense_regions import DenseSampling, sample_predicted_boxes, vectors_of


def hidden_read(pre_activation: bool) -> Regions:
    """What is read of a box head as the vectors of regions."""
    return Regions(pre_activation=True) if pre_activation else Regions(hidden=True)


def hidden_vectors(view: View, regions: RegionSet, read: Regions) -> Tensor:
    """(R, D), what :func:`hidden_read` asks for."""
    outputs = view.regions(regions, read)
    return outputs.pre_activation if read.pre_activation else outputs.hidden


class TwoStageRegions:
    """Sampled proposals, and what the box head of a two-stage student makes of them."""

    def __init__(self, proposals_from: str, pre_activation: bool):
        """
        Args:
            proposals_from: student or teacher.
            pre_activation: vectors before the last activation.
        """
        self.proposals_from = proposals_from
        self.hidden_read = hidden_read(pre_activation)

    def reads(self) -> Tuple[Tuple[Read, ...], Tuple[Read, ...]]:
        """What of the student and of the teacher the regions are made of."""
        proposals = (Proposals(),)
        return (proposals, ()) if self.proposals_from == "student" else ((), proposals)

    def vector_reads(self) -> Tuple[Read, ...]:
        """What of the student the vectors are made of."""
        return (self.hidden_read,)

    def sample(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> RegionSet:
        view = student if self.proposals_from == "student" else teacher
        return view.proposals(Proposals())

    def vectors(self, student: StudentView, regions: RegionSet) -> Tensor:
        """(R, D), with gradient."""
        return hidden_vectors(student, regions, self.hidden_read)


class DenseRegions:
    """Boxes that a dense student predicts, and what its class tower holds where they were
    predicted."""

    def __init__(self, sampling: DenseSampling, num_blocks: int, pre_activation: bool):
        """
        Args:
            sampling: which boxes.
            num_blocks: of the class tower.
            pre_activation: vectors before the last activation.
        """
        self.sampling = sampling
        self.tower_read = Tower("cls", num_blocks, pre_activation)

    def reads(self) -> Tuple[Tuple[Read, ...], Tuple[Read, ...]]:
        return (Dense(),), ()

    def vector_reads(self) -> Tuple[Read, ...]:
        return (self.tower_read,)

    def sample(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> RegionSet:
        return sample_predicted_boxes(student, targets, self.sampling)

    def vectors(self, student: StudentView, regions: RegionSet) -> Tensor:
        """(R, D), with gradient."""
        num_anchors = student.family.dense_head.num_anchors
        return vectors_of(student.tower(self.tower_read), regions.anchors, num_anchors)

"""Prediction mimicking: the student's head learns from the teacher's predictions directly. The
baseline that CrossKD (arXiv 2306.11369) is compared with, with the same losses."""

from typing import Dict, List

from detectron2.config import CfgNode
from torch import Tensor

from d2kd.methods.core import DISTILLER_REGISTRY
from d2kd.methods.core.dense_kd import OUTPUTS, TARGETS, DenseKD
from d2kd.views import (
    Assignment,
    Dense,
    Family,
    Reads,
    StudentView,
    TeacherView,
    View,
)


@DISTILLER_REGISTRY.register()
class Mimicking(DenseKD):
    """The student's class, box and centerness predictions towards the teacher's."""

    @classmethod
    def reads(cls, node: CfgNode, student: Family, teacher: Family) -> Dict[str, Reads]:
        return {
            name: Reads(student=(Dense((OUTPUTS[name],)), Assignment()), teacher=(TARGETS[name],))
            for name in cls.enabled_terms(node)
        }

    def predictions(self, student: StudentView, teacher: TeacherView) -> Dict[str, List[Tensor]]:
        return student.predictions._asdict()

    def box_decoder(self, student: StudentView, teacher: TeacherView) -> View:
        return student

"""Prediction mimicking: the student's head learns from the teacher's predictions directly. The
baseline that CrossKD (arXiv 2306.11369) is compared with, with the same losses."""

from typing import Dict, List

from torch import Tensor

from d2kd.methods.dense_kd import DenseKD
from d2kd.methods.distiller import DISTILLER_REGISTRY, Needs


@DISTILLER_REGISTRY.register()
class Mimicking(DenseKD):
    """The student's class, box and centerness predictions towards the teacher's."""

    requires = {
        "cls": Needs(student=("dense", "assignment"), teacher=("dense",)),
        "bbox": Needs(student=("dense", "assignment"), teacher=("dense",)),
        "centerness": Needs(student=("dense", "assignment"), teacher=("dense",)),
    }

    def predictions(self, student, teacher) -> Dict[str, List[Tensor]]:
        return student.dense.predictions._asdict()

    def coder(self, student, teacher):
        return student.dense

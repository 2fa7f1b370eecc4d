"""Teacher and student together: building a pair, and a training step of it."""

from .build import build_model, build_teacher, declared_reads, distilled_methods, weights_on_classes
from .detectors import (
    TeacherSource,
    build_detector,
    build_teacher_detector,
    refuse_missing_weights,
    save_random_teacher,
)
from .teacher import Teacher
from .teacher_student import TeacherStudent, fill_from_run

__all__ = [
    "Teacher",
    "TeacherSource",
    "TeacherStudent",
    "build_detector",
    "build_model",
    "build_teacher",
    "build_teacher_detector",
    "declared_reads",
    "distilled_methods",
    "fill_from_run",
    "refuse_missing_weights",
    "save_random_teacher",
    "weights_on_classes",
]

"""Teacher and student together: building a pair, and a training step of it."""

from .build import build_model, build_teacher, declared_reads, distilled_methods, keys_on_classes
from .detectors import (
    TeacherSource,
    build_detector,
    build_teacher_detector,
    million_parameters,
    refuse_missing_weights,
    save_random_teacher,
    student_on_meta,
    teacher_on_meta,
)
from .teacher import Teacher
from .teacher_student import LOG_PERIOD, TeacherStudent, fill_from_run

__all__ = [
    "LOG_PERIOD",
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
    "keys_on_classes",
    "million_parameters",
    "refuse_missing_weights",
    "save_random_teacher",
    "student_on_meta",
    "teacher_on_meta",
]

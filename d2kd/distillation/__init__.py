"""Teacher and student together: building a pair, and a training step of it."""

from .build import build_detector, build_model, build_teacher
from .teacher import Teacher
from .teacher_student import TeacherStudent, fill_from_run

__all__ = [
    "Teacher",
    "TeacherStudent",
    "build_detector",
    "build_model",
    "build_teacher",
    "fill_from_run",
]

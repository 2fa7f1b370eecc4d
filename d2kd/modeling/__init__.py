"""Teacher, student, and what is read of them."""

# Importing registers the meta-architectures and backbones.
from . import backbone, meta_arch
from .build import build_detector, build_model, build_teacher
from .families import FAMILY_REGISTRY, Family, build_family
from .teacher import Teacher
from .teacher_student import TeacherStudent
from .views import StudentView, TeacherView, View

__all__ = [
    "FAMILY_REGISTRY",
    "Family",
    "StudentView",
    "Teacher",
    "TeacherStudent",
    "TeacherView",
    "View",
    "backbone",
    "build_detector",
    "build_family",
    "build_model",
    "build_teacher",
    "meta_arch",
]

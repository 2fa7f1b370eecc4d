"""Reading weights, the student's own file, and what a run goes on from."""

from .finite import first_not_finite, refuse_not_finite
from .formats import class_names_in
from .resuming import (
    BEST_WEIGHTS,
    EMA_WEIGHTS,
    PARAMETER_NAMES,
    SavedRun,
    checkpoint_names,
    newest_checkpoint,
    pointed_checkpoint,
    refuse_occupied,
)
from .student import (
    STUDENT_PROGRAM,
    STUDENT_YAML,
    Best,
    StudentCheckpointer,
    read_best,
    write_student_program,
    write_student_yaml,
)
from .verify import other_settings
from .weights import (
    checksum,
    load_teacher_weights,
    load_trained_weights,
    read_weights,
    refuse_missing,
)

__all__ = [
    "BEST_WEIGHTS",
    "EMA_WEIGHTS",
    "PARAMETER_NAMES",
    "STUDENT_PROGRAM",
    "STUDENT_YAML",
    "Best",
    "SavedRun",
    "StudentCheckpointer",
    "checkpoint_names",
    "checksum",
    "class_names_in",
    "first_not_finite",
    "load_teacher_weights",
    "load_trained_weights",
    "newest_checkpoint",
    "other_settings",
    "pointed_checkpoint",
    "read_best",
    "read_weights",
    "refuse_missing",
    "refuse_not_finite",
    "refuse_occupied",
    "write_student_program",
    "write_student_yaml",
]

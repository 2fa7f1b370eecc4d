"""Checking a run before it starts: its config, data, evaluation, pair and first steps."""

from .run import Part, TeacherAP, check_config, check_run

__all__ = ["Part", "TeacherAP", "check_config", "check_run"]

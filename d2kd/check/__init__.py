"""Checking a run before it starts: its config, data, evaluation, pair and first steps."""

from .run import Part, TeacherAP, check_run, check_without_data

__all__ = ["Part", "TeacherAP", "check_without_data", "check_run"]

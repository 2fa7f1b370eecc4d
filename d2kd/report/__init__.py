"""The page that ``d2kd report`` writes about runs."""

from .page import write_report

__all__ = ["write_report"]

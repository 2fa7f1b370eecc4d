"""What a detector costs and what it is worth, and how much of a teacher a student has."""

from .analyze import Analysis, analyze, gap_closed

__all__ = ["Analysis", "analyze", "gap_closed"]

"""Training, evaluation, and the command line."""

from .trainer import DistillTrainer

__all__ = ["DistillTrainer"]

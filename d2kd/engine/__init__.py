"""Training and evaluation."""

from .trainer import DistillTrainer

__all__ = ["DistillTrainer"]

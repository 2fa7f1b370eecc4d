"""Training and evaluation."""

from .processes import run_with_torchrun
from .trainer import DistillTrainer

__all__ = ["DistillTrainer", "run_with_torchrun"]

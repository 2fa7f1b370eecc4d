"""Family adapters, one file per kind of detector."""

from . import dense, two_stage  # registers them
from .assignment import Assignment
from .dense_head import BRANCHES, DenseHead, DensePredictions, TowerHead
from .family import FAMILY_REGISTRY, Family, Level, build_family, paired_levels

__all__ = [
    "BRANCHES",
    "Assignment",
    "FAMILY_REGISTRY",
    "DenseHead",
    "DensePredictions",
    "Family",
    "Level",
    "TowerHead",
    "build_family",
    "paired_levels",
    "dense",
    "two_stage",
]

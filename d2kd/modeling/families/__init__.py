"""Family adapters, one file per kind of detector."""

from . import dense, two_stage  # registers them
from .assignment import Assignment
from .box_head import BoxHead, RoIs
from .dense_head import BRANCHES, DenseHead, DensePredictions, TowerHead
from .family import FAMILY_REGISTRY, Family, Level, build_family, paired_levels, paired_stages

__all__ = [
    "BRANCHES",
    "Assignment",
    "BoxHead",
    "FAMILY_REGISTRY",
    "DenseHead",
    "DensePredictions",
    "Family",
    "Level",
    "RoIs",
    "TowerHead",
    "build_family",
    "paired_levels",
    "paired_stages",
    "dense",
    "two_stage",
]

"""Family adapters, one file per kind of detector."""

from . import dense, two_stage  # registers them
from .assignment import Assignment
from .box_head import BoxHead, RoIs
from .dense_head import BRANCHES, DenseHead, DensePredictions, TowerHead
from .family import FAMILY_REGISTRY, Family, Level, build_family, paired_levels, paired_stages
from .stages import StagePair, trained_stage_pairs
from .transfer import copy_weights

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
    "StagePair",
    "TowerHead",
    "build_family",
    "copy_weights",
    "paired_levels",
    "paired_stages",
    "dense",
    "trained_stage_pairs",
    "two_stage",
]

"""Families of detectors, one file per kind."""

# Importing registers them.
from . import dense, two_stage
from .assignment import AnchorTargets
from .box_head import BoxHead
from .dense_head import BRANCHES, DenseHead, DensePredictions, TowerHead
from .family import FAMILY_REGISTRY, Family, Level, Pixels, any_family, build_family, find_family

__all__ = [
    "BRANCHES",
    "AnchorTargets",
    "BoxHead",
    "DenseHead",
    "DensePredictions",
    "FAMILY_REGISTRY",
    "Family",
    "Level",
    "Pixels",
    "TowerHead",
    "any_family",
    "build_family",
    "dense",
    "find_family",
    "two_stage",
]

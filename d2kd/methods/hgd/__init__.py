"""HGD (our reading of its abstract): imitation of all stages, re-weighted."""

from .distiller import HGD
from .weights import element_weights, stage_weights, weighted_distance

__all__ = ["HGD", "element_weights", "stage_weights", "weighted_distance"]

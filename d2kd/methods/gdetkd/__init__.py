"""G-DetKD: a two-stage teacher for any student, region by region."""

from .contrast import contrastive_loss
from .distiller import GDetKD
from .imitation import match_levels
from .predictions import class_aware_localization

__all__ = ["GDetKD", "class_aware_localization", "contrastive_loss", "match_levels"]

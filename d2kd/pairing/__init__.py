"""From the names of a student and a teacher to a recipe: which method suits them, and why."""

from .choice import PREFERENCES, Choice, Preference, choose, methods_that_fit
from .pair import Classes, Pair, open_pair
from .plan import Plan, make_plan

__all__ = [
    "PREFERENCES",
    "Choice",
    "Classes",
    "Pair",
    "Plan",
    "Preference",
    "choose",
    "make_plan",
    "methods_that_fit",
    "open_pair",
]

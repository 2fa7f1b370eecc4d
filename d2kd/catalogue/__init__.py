"""What there is to choose from: methods, recipes, teachers and config keys, explained from the code
and from the configs themselves."""

from .explain import explain
from .listing import KINDS, listing

__all__ = ["KINDS", "explain", "listing"]

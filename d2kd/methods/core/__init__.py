"""What methods are made of: their base class, schedules, adapters, and shared losses."""

from .adapters import conv_adapters, identity_adapters, matching_adapters
from .distiller import (
    DISTILLER_REGISTRY,
    Defaults,
    Diagnostics,
    Distiller,
    Terms,
    loss_name,
    scalar_name,
)
from .returned import check_returned
from .schedule import TermSchedule, term
from .unregistered import drop_unregistered, unregistered

__all__ = [
    "DISTILLER_REGISTRY",
    "Defaults",
    "Diagnostics",
    "Distiller",
    "TermSchedule",
    "Terms",
    "check_returned",
    "conv_adapters",
    "drop_unregistered",
    "identity_adapters",
    "loss_name",
    "matching_adapters",
    "scalar_name",
    "term",
    "unregistered",
]

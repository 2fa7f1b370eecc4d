"""Reading a detector on a batch: what can be read, observing it, and families of detectors."""

from .families import FAMILY_REGISTRY, Family, Level, any_family, build_family, find_family
from .pairs import LevelPair, channels_of, paired_levels, paired_stages
from .reads import (
    Assignment,
    CannotRead,
    Dense,
    Features,
    Proposals,
    Read,
    Reads,
    Regions,
    Stage,
    Tower,
)
from .recorder import Observed, Recorder
from .regions import RegionOutputs, RegionSet
from .views import StudentView, TeacherView, View

__all__ = [
    "Assignment",
    "CannotRead",
    "Dense",
    "FAMILY_REGISTRY",
    "Family",
    "Features",
    "Level",
    "LevelPair",
    "Observed",
    "Proposals",
    "Read",
    "Reads",
    "Recorder",
    "RegionOutputs",
    "RegionSet",
    "Regions",
    "Stage",
    "StudentView",
    "TeacherView",
    "Tower",
    "View",
    "any_family",
    "build_family",
    "channels_of",
    "find_family",
    "paired_levels",
    "paired_stages",
]

"""The classes of data sets."""

import re
from typing import Sequence, Tuple

from detectron2.data import MetadataCatalog


def class_names_of(names: Sequence[str]) -> Tuple[str, ...]:
    """The classes of the first of some data sets, in order; none if they are not known. One that is
    registered from a JSON in COCO's format without metadata knows them once it has been loaded.

    Args:
        names: of registered data sets.
    """
    return tuple(MetadataCatalog.get(names[0]).get("thing_classes", ())) if names else ()


def plain_name(name: str) -> str:
    """A class's name without case, spaces, hyphens and underscores, by which names are compared."""
    return re.sub(r"[\s_-]+", "", name).lower()

"""The classes of data sets."""

import re
from typing import Iterable, Optional, Sequence, Tuple

from detectron2.data import MetadataCatalog


def class_names_of(names: Sequence[str]) -> Tuple[str, ...]:
    """The classes of the first of some data sets, in order; none if they are not known before it is
    loaded.

    Args:
        names: of registered data sets.
    """
    return tuple(MetadataCatalog.get(names[0]).get("thing_classes", ())) if names else ()


def num_classes_of(dataset_names: Iterable[str]) -> Optional[int]:
    """Number of thing classes of the first data set that declares them, else None.

    A data set registered from a COCO JSON without metadata declares them once it has been loaded.
    """
    for name in dataset_names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None:
            return len(classes)
    return None


def plain_name(name: str) -> str:
    """A class's name without case, spaces, hyphens and underscores, by which names are compared."""
    return re.sub(r"[\s_-]+", "", name).lower()

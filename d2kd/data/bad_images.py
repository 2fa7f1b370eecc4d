"""Images that cannot be read in the middle of a run: told in one line with their file.

A process that loads data cannot raise a :class:`~d2kd.errors.UserError`: torch would add its
traceback to the message. It puts what is wrong into the sample, and the process that trains or
evaluates looks there.
"""

from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

from detectron2.data import DatasetMapper

from d2kd.errors import UserError

from .findings import ERROR
from .images import A_STRIP, check_image, too_deep
from .workers import leave_signals_to_parent

# In a sample: (file, what is wrong with it) of images that could not be read for it
BAD_IMAGES = "bad_images"

Mapper = Callable[[Dict[str, Any]], Optional[Dict[str, Any]]]


class BadImage(Exception):
    """The image of a dict cannot be read. The message says why, for people."""


def makes_white(mapper: Mapper) -> bool:
    """Whether a mapper is Detectron2's, which makes white of 16 bits; another may scale them."""
    return isinstance(mapper, DatasetMapper)


def mapped(entry: Dict[str, Any], mapper: Mapper, refuse_deep: bool) -> Optional[Dict[str, Any]]:
    """What a mapper makes of a dict in Detectron2's format.

    Args:
        entry: the dict.
        mapper: maps it.
        refuse_deep: images of more than 8 bits per channel cannot be read.

    Raises:
        BadImage: if its image is to blame that there is nothing.
    """
    deep = refuse_deep and too_deep(entry.get("file_name", ""))
    if deep:
        raise BadImage(deep.message)
    try:
        return mapper(entry)
    except Exception as error:
        problem = check_image(entry)
        if problem is None or (problem.severity != ERROR and problem.kind != A_STRIP):
            raise  # the image is not to blame
        raise BadImage(problem.message) from error


class NamingMapper:
    """A mapper for evaluation that says which image cannot be read, in its sample."""

    def __init__(self, mapper: Mapper):
        self.mapper, self.refuse_deep = mapper, makes_white(mapper)

    def __call__(self, entry: Dict[str, Any]) -> Dict[str, Any]:
        leave_signals_to_parent()
        try:
            return mapped(entry, self.mapper, self.refuse_deep)
        except BadImage as problem:
            return {**entry, BAD_IMAGES: [(entry["file_name"], str(problem))]}


class NamingLoader:
    """Batches of a loader whose mapper is a :class:`NamingMapper`."""

    def __init__(self, loader):
        """
        Args:
            loader: from Detectron2's ``build_detection_test_loader``.
        """
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[List[Mapping[str, Any]]]:
        """
        Raises:
            UserError: for an image that cannot be read.
        """
        for batch in self.loader:
            for path, problem in (bad for sample in batch for bad in sample.get(BAD_IMAGES, ())):
                raise UserError(f"image {path} cannot be read ({problem}): repair it")
            yield batch

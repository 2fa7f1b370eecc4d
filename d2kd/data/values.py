"""What numbers in annotations may be."""

from typing import Any

NUMBERS = frozenset((int, float))  # True and False are none
MAX_COORDINATE = 1e12  # more is no coordinate; NaN and infinity are not below it either
_LARGEST_ID = 2**63


def is_whole(value: Any) -> bool:
    """Whether it is a whole number: pandas writes 1280.0 for 1280."""
    return type(value) is int or (type(value) is float and value.is_integer())


def is_id(value: Any) -> bool:
    """Whether it is a whole number that an array can hold."""
    return is_whole(value) and -_LARGEST_ID <= value < _LARGEST_ID


def is_box(box: Any) -> bool:
    """Whether it is four finite numbers."""
    if not is_four_numbers(box):
        return False
    return all(-MAX_COORDINATE < value < MAX_COORDINATE for value in box)


def is_four_numbers(box: Any) -> bool:
    """Whether it is that, finite or not."""
    return isinstance(box, (list, tuple)) and len(box) == 4 and NUMBERS.issuperset(map(type, box))

"""How deep and how wide a pickle is nested, found without building it.

A few bytes can describe what Python cannot hold: tuples within tuples a million deep, whose hash
overflows the stack of C, or a tuple of twice the same tuple of twice the same ..., which has more
entries than there is time.
"""

import pickletools
from typing import BinaryIO, Dict, List, NamedTuple, Optional

_DEEPEST = 200  # containers within containers; calls and their arguments count as such
_MAX_VALUES = 10_000_000  # values, those that occur twice counted twice
_FILLS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_READS_MEMO = ("GET", "BINGET", "LONG_BINGET")
_WRITES_MEMO = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")


class Endless(Exception):
    """A pickle describes more than can be held; the message says what."""


class _Extent(NamedTuple):
    depth: int
    values: int


_EMPTY = _Extent(1, 1)

# A cell holds what is on the unpickler's stack, since lists and dicts grow after they are made;
# None is a mark of the stack.
_Cell = List[_Extent]


def refuse_endless(file: BinaryIO, pickles: int = 1) -> None:
    """
    Args:
        file: read from where it stands, to the end of the pickles.
        pickles: how many of them follow each other.

    Raises:
        Endless: if one of them is nested too deeply, holds too many values, or numbers them in a
            way that would fill the memory.
        Exception: whatever a damaged pickle leads to.
    """
    for _ in range(pickles):
        _follow(file)


def _follow(file: BinaryIO) -> None:
    stack: List[Optional[_Cell]] = []
    memo: Dict[int, _Cell] = {}
    for op, argument, position in pickletools.genops(file):
        if op.name in _READS_MEMO:
            stack.append(memo[int(argument)])
        elif op.name in _WRITES_MEMO:
            index = len(memo) if op.name == "MEMOIZE" else int(argument)
            if index > position:  # the unpickler's memo is a list of as many places
                raise Endless(f"names its value {index} after {position} bytes")
            memo[index] = stack[-1]
        elif op.name == "MARK":
            stack.append(None)
        elif op.name == "DUP":
            stack.append(stack[-1])
        elif not op.stack_before:  # numbers and text, most of all
            stack.extend([_EMPTY] for _ in op.stack_after)
        else:
            taken = _take(stack, op)
            if op.name in _FILLS:
                target, *parts = taken
                target[0] = _checked(_filled(target[0], parts))
                stack.append(target)
            else:
                stack.extend([_checked(_filled(_EMPTY, taken))] for _ in op.stack_after)


def _take(stack: List[Optional[_Cell]], op: pickletools.OpcodeInfo) -> List[_Cell]:
    """Removes from a stack what an operation works on, and returns it."""
    taken: List[_Cell] = []
    count = len(op.stack_before)
    if pickletools.markobject in op.stack_before:
        count = op.stack_before.index(pickletools.markobject)
        while (cell := stack.pop()) is not None:
            taken.append(cell)
    taken += (cell for cell in [stack.pop() for _ in range(count)] if cell is not None)
    return taken[::-1]


def _filled(container: _Extent, parts: List[_Cell]) -> _Extent:
    """The extent of a container that has got some more values."""
    deepest = 1 + max((cell[0].depth for cell in parts), default=0)
    values = container.values + sum(cell[0].values for cell in parts)
    return _Extent(max(container.depth, deepest), values)


def _checked(extent: _Extent) -> _Extent:
    if extent.depth > _DEEPEST:
        raise Endless(f"is nested more than {_DEEPEST} deep")
    if extent.values > _MAX_VALUES:
        raise Endless(f"holds more than {_MAX_VALUES:,} values")
    return extent

"""Reading pickles that hold arrays and plain containers, and nothing else.

A pickle is a program. The one read here knows a handful of names, each of which builds data. Not
even numpy's own functions are called: they believe whatever state a pickle gives them.
"""

import collections
import pickle
import re
from typing import Any, BinaryIO, Callable, Dict, Tuple

import numpy as np

from .nesting import refuse_endless

# bool, integers, floats, complex numbers, bytes and text
_DATA = "biufcSU"


class ForeignObject(Exception):
    """A pickle names something that is neither an array nor a plain container."""


def read_pickle(file: BinaryIO) -> Any:
    """
    Args:
        file: a pickle of any protocol, of Python 2 or 3.

    Returns:
        what it holds: dicts, lists, tuples, sets, text, numbers, numpy arrays and scalars.

    Raises:
        ForeignObject: if it holds anything else; the message is its name.
        Exception: whatever a damaged or endless pickle leads to.
    """
    start = file.tell()
    refuse_endless(file)
    file.seek(start)
    return _arrays(_DataUnpickler(file, encoding="latin1").load(), {})


class _DType:
    """Stands for a numpy dtype of one number or text."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[<>|=]?[a-zA-Z?]\d*", code) or np.dtype(code).kind not in _DATA:
            raise ForeignObject(f"numpy.dtype('{code}')")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Tuple) -> None:
        if state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a numpy array until all of the pickle is read."""

    value: np.ndarray

    def __setstate__(self, state: Tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: _DType, shape: Tuple, order: str) -> np.ndarray:
    if isinstance(data, str):  # bytes of Python 2
        data = data.encode("latin1")
    values = np.frombuffer(data, dtype.dtype)
    return values.reshape(shape, order=order).astype(dtype.dtype.newbyteorder("="))


def _scalar(dtype: _DType, data: Any) -> np.generic:
    return _array(data, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ForeignObject(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


def _known() -> Dict[str, Any]:
    """What a pickle may name. The functions are made anew each time, because a pickle can change
    the attributes of what it gets."""
    known: Dict[str, Any] = {
        "collections.OrderedDict": collections.OrderedDict,
        "_codecs.encode": lambda text, encoding="latin1": _encode(text, encoding),
        "numpy.ndarray": "numpy.ndarray",
        "numpy.dtype": lambda *args: _DType(*args),
    }
    functions: Dict[str, Callable] = {
        "multiarray._reconstruct": lambda *_: _Array(),
        "multiarray.scalar": lambda dtype, data: _scalar(dtype, data),
        "numeric._frombuffer": lambda *args: _array(*args),
    }
    for module in ("numpy.core", "numpy._core"):
        known.update({f"{module}.{name}": function for name, function in functions.items()})
    for module in ("builtins", "__builtin__"):
        known.update({f"{module}.set": set, f"{module}.frozenset": frozenset})
        known[f"{module}.bytes"] = lambda: b""  # how protocol 2 writes those of an empty array
    return known


class _DataUnpickler(pickle.Unpickler):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._known = _known()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._known:
            raise ForeignObject(full)
        return self._known[full]

    def persistent_load(self, pid: Any) -> Any:
        raise ForeignObject("data outside the pickle")


def _arrays(value: Any, done: Dict[int, Any]) -> Any:
    """Puts the arrays where their stand-ins are.

    Args:
        value: what the pickle holds, kept until all is done.
        done: what has been made of a container, by its id: one may occur in many places.
    """
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, (dict, list, tuple)) and id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {k: _arrays(v, done) for k, v in value.items()}
        else:
            done[id(value)] = type(value)(_arrays(v, done) for v in value)
    return done.get(id(value), value)

"""Reading a checkpoint file of any kind, as data: nothing that a file holds is ever run."""

import os
import re
import zipfile
from typing import Any, Tuple

import torch

from .nesting import Endless, refuse_endless
from .pickles import ForeignObject, read_pickle

# What torch.save writes first: a zip archive, or (before 1.6, and for what MMDetection publishes) a
# pickled number, of which these are the last bytes.
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"
_LEGACY_PICKLES = 5  # that number, the version, the machine, the content, the names of the storages
_BEFORE_TEXT = b"\xef\xbb\xbf \t\r\n"  # UTF-8's mark, and spaces
_OPENMMLAB = ("mmengine.", "mmcv.", "mmdet.", "mmrazor.")
# What files straight from training hold beside the weights, such as histories of losses; torch
# reads its own tensors without these.
_BESIDE_WEIGHTS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{c}.multiarray.{x}" for c in ("core", "_core") for x in ("scalar", "_reconstruct")),
)


class Unreadable(Exception):
    """A file is no checkpoint that d2kd reads; the message says why and what to do."""


def read_file(path: str) -> Tuple[Any, bool]:
    """
    Args:
        path: a file of the local disk. What it is, is read from its first bytes, whatever its name:
            a checkpoint of torch in the zip or the old format, or a pickle of arrays.

    Returns:
        what it holds, tensors on the CPU; whether it is a pickle of arrays.

    Raises:
        Unreadable: if it is something else, is damaged, or holds objects that only code could
            build.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would never end
        raise Unreadable("is no file")
    with open(path, "rb") as f:
        head = f.read(256)
    if not head:
        raise Unreadable("the file is empty, not a checkpoint")
    if head.lstrip(_BEFORE_TEXT)[:1] == b"<":
        raise Unreadable("is a web page, not a checkpoint: download the file that the page links")
    if head[8:9] == b"{":
        raise Unreadable(
            "is a file of safetensors: turn it into one of torch's, "
            "torch.save(safetensors.torch.load_file(...), ...)"
        )
    try:
        if head.startswith(_ZIP_MAGIC):
            _check_archive(path)
            return _torch_load(path), False
        with open(path, "rb") as f:
            if _LEGACY_MAGIC not in head[:32]:
                return read_pickle(f), True
            refuse_endless(f, _LEGACY_PICKLES)
        return _torch_load(path), False
    except Unreadable:
        raise
    except ForeignObject as e:
        raise Unreadable(_foreign(str(e))) from e
    except Endless as e:
        raise Unreadable(f"is no checkpoint: its pickle {e}") from e
    except Exception as e:  # whatever a damaged file makes a reader raise
        # The text of torch's own errors advises to switch its safe reading off.
        raise Unreadable(
            f"truncated, damaged or not a checkpoint ({type(e).__name__} while reading it, "
            f"{os.path.getsize(path):,} bytes)"
        ) from e


class _Ignored:
    """Stands for an object of a file that nothing reads; whatever it is built from is dropped."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _torch_load(path: str) -> Any:
    known = [(_Ignored, name) for name in _BESIDE_WEIGHTS]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(e))
        if foreign is None:
            raise
        raise ForeignObject(foreign[1]) from e


def _check_archive(path: str) -> None:
    """The checksum of every record, at which torch does not look, and its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.filename.endswith("/constants.pkl") for record in records):
                raise Unreadable("is a TorchScript program, not a checkpoint: save its state_dict")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise Unreadable("is a compressed archive, not a checkpoint: unpack it first")
            damaged = archive.testzip()
            for record in records if damaged is None else ():
                if record.filename.endswith(".pkl"):
                    with archive.open(record) as f:
                        refuse_endless(f)
    except zipfile.BadZipFile as e:
        raise Unreadable(f"truncated or damaged, not a checkpoint ({e})") from e
    if damaged is not None:
        raise Unreadable(
            f"damaged: the checksum of its record {damaged} is wrong (or it was saved without any, "
            "by torch.serialization.set_crc32_options(False))"
        )


def _foreign(name: str) -> str:
    remedy = "nothing in a file is run; save its tensors alone: {'model': model.state_dict()}"
    if name.startswith(_OPENMMLAB):
        remedy = (
            "it comes straight from training: publish it with MMDetection's "
            "tools/model_converters/publish_model.py, or save its 'state_dict' and 'meta' alone"
        )
    return f"holds objects that d2kd does not read: {name}; {remedy}"

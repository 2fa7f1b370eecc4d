"""From whatever a file holds to what Detectron2's checkpointer fills a model from."""

import logging
import os
from collections import Counter
from typing import Any, Collection, Dict, Mapping, Tuple

import numpy as np
import torch

from d2kd.errors import UserError

from .files import Unreadable, read_file
from .mmdet import convert, is_mmdet
from .mmdet_names import translate

logger = logging.getLogger(__name__)

# In a file of d2kd's: the names of the student's classes, in order
CLASSES = "classes"
# Endings of the names of what has to be real numbers
_WEIGHTS = (".weight", ".bias", ".running_mean", ".running_var")
_MAX_PER_BYTE = 64  # numbers in tensors, some of which share what is stored
_BOTTOM_UP = "backbone.bottom_up."


def read_checkpoint(path: str, names: Collection[str] = ()) -> Dict[str, Any]:
    """
    Args:
        path: of the local disk. A file of Detectron2, of its model zoo, of Detectron, pycls,
            torchvision (ResNets) or MMDetection, or a bare state dict.
        names: of the model's own parameters; if they are like MMDetection's or torchvision's,
            such files are left as they are.

    Returns:
        "model": tensors or arrays by name. For names that are to be matched by their endings
        "matching_heuristics" and "__author__", as in Detectron2. Of a file of MMDetection "sources"
        (see :class:`~d2kd.checkpoint.mmdet.Converted`) and "meta". Whatever else a file of
        Detectron2 has.

    Raises:
        Unreadable: see :func:`~d2kd.checkpoint.files.read_file`.
    """
    data, is_pickle = read_file(path)
    _expect_dict(data)
    if is_pickle:
        is_of_zoo = "model" in data and "__author__" in data
        _expect_weights(data["model"] if is_of_zoo else data.get("blobs", data), path)
        return data if is_of_zoo else _from_caffe2(data)
    state = data.get("model_state", data.get("model", data.get("state_dict", data)))
    _expect_weights(state, path)
    if "model_state" in data:
        return _matched_by_ending(state, "pycls")
    if is_mmdet(state) and not is_mmdet(names):
        return _from_mmdet(state, data.get("meta"))
    if _is_torchvision(state) and not _is_torchvision(names):
        return _from_torchvision(state)
    return data if "model" in data else {"model": state}


def _expect_dict(data: Any) -> None:
    if not isinstance(data, dict):
        raise Unreadable(f"holds a {type(data).__name__} where a state dict is expected")


def _expect_weights(state: Any, path: str) -> None:
    """
    Raises:
        Unreadable: if a state dict is none, or has weights that are no plain numbers.
    """
    _expect_dict(state)
    for name, value in state.items():
        if not isinstance(name, str):
            raise Unreadable(f"its state dict has the key {name!r:.40}, expected names")
        if name.endswith(_WEIGHTS) and not _is_weight(value):
            kind = getattr(value, "dtype", type(value).__name__)
            raise Unreadable(f"its '{name}' is no plain tensor of real numbers ({kind})")
    tensors = [x for x in state.values() if isinstance(x, torch.Tensor)]
    numbers, size = sum(x.numel() for x in tensors), os.path.getsize(path)
    if numbers > _MAX_PER_BYTE * size:  # tensors that repeat what is stored once
        raise Unreadable(f"its tensors have {numbers:,} numbers, and the file {size:,} bytes")


def _is_weight(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "f"
    if not isinstance(value, torch.Tensor) or value.is_meta or value.is_nested:
        return False
    return value.is_floating_point() and value.layout == torch.strided


def _matched_by_ending(state: Mapping[str, Any], author: str) -> Dict[str, Any]:
    kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return {"model": kept, "__author__": author, "matching_heuristics": True}


def _from_caffe2(data: Mapping[str, Any]) -> Dict[str, Any]:
    """Detectron's files: detectors under "blobs", ImageNet's networks bare."""
    blobs = data.get("blobs", data)
    kept = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
    return _matched_by_ending(kept, "Caffe2")


def _is_torchvision(names: Collection[str]) -> bool:
    return "conv1.weight" in names and "layer1.0.conv1.weight" in names


def _from_torchvision(state: Mapping[str, Any]) -> Dict[str, Any]:
    names = translate(f"backbone.{name}" for name in state)
    renamed = {
        names[f"backbone.{name}"][len(_BOTTOM_UP) :]: tensor
        for name, tensor in state.items()
        if f"backbone.{name}" in names
    }
    return _matched_by_ending(renamed, "torchvision")


def _from_mmdet(state: Mapping[str, Any], meta: Any) -> Dict[str, Any]:
    meta = meta if isinstance(meta, dict) else None
    converted = convert(state, meta)
    reasons = Counter(converted.left_out.values()).items()
    logger.info(
        f"A file of MMDetection with {len(state)} tensors; left out are "
        f"{', '.join(f'{n} ({why})' for why, n in reasons) or 'none'}"
    )
    return {"model": converted.tensors, "sources": converted.sources, "meta": meta}


def class_names_in(path: str) -> Tuple[str, ...]:
    """The class names that a checkpoint of d2kd's holds, in order; none if it holds none.

    Args:
        path: of the local disk.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        data, _ = read_file(path)
    except Unreadable as e:
        raise UserError(f"'{path}' {e}") from e
    return classes_in(data) if isinstance(data, dict) else ()


def classes_in(checkpoint: Mapping[str, Any]) -> Tuple[str, ...]:
    """The class names in what a checkpoint of d2kd's holds; none if it holds none."""
    names = checkpoint.get(CLASSES)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()

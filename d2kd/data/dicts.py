"""What is wrong in dicts in Detectron2's format, of a data set that is registered without a file.

They are looked into as the file in COCO's format that Detectron2 writes of them for the evaluation.
"""

import json
import os
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from .annotations import check_annotations
from .findings import ERROR, Finding
from .values import is_four_numbers

# Of an annotation, what the checks read beside its mask
_CHECKED = ("bbox", "category_id", "iscrowd", "ignore")
# What Detectron2 writes as it is; everything else it makes Python's numbers of
_WRITTEN = ("segmentation", "keypoints")


def findings_in_dicts(
    dicts: Sequence[Mapping[str, Any]], name: str, evaluated: bool, masks: str
) -> List[Finding]:
    """What is wrong in the annotations of a set that is registered without a file.

    Args:
        dicts: in Detectron2's format.
        name: of the set.
        evaluated: it is evaluated with.
        masks: what :func:`~d2kd.data.annotations.check_annotations` takes.
    """
    metadata = MetadataCatalog.get(name)
    data = _as_file(dicts, metadata.get("thing_classes", ()))
    written = evaluated and metadata.get("evaluator_type") == "coco"  # as JSON, by Detectron2
    unwritable = _unwritable(dicts, name) if written else ()
    return [*check_annotations(data, name, evaluated, masks), *unwritable]


def _as_file(dicts: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Mapping[str, Any]:
    """Dicts as the content of a file in COCO's format. What is no box stays so."""
    images: List[Mapping[str, Any]] = []
    annotations: List[Mapping[str, Any]] = []
    for d in dicts:
        id = _plain(d.get("image_id", d.get("file_name")))
        image = {k: _plain(d[k]) for k in ("file_name", "width", "height") if k in d}
        images.append({**image, "id": id})
        for a in d.get("annotations", ()):
            annotations.append({**_annotation(a), "id": len(annotations) + 1, "image_id": id})
    numbers = {a.get("category_id") for a in annotations}
    known: List[Tuple[int, str]] = list(enumerate(classes)) or [(n, str(n)) for n in numbers]
    categories = [{"id": number, "name": name} for number, name in known]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(a: Mapping[str, Any]) -> Dict[str, Any]:
    checked = {k: _plain(a[k]) for k in _CHECKED if k in a}
    if is_four_numbers(checked.get("bbox")) and "bbox_mode" in a:
        checked["bbox"] = BoxMode.convert(checked["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS)
    if "segmentation" in a:
        mask = a["segmentation"]
        is_run_lengths = isinstance(mask, dict)
        checked["segmentation"] = {k: _plain(mask[k]) for k in mask} if is_run_lengths else mask
    return {"area": 0.0, "iscrowd": 0, **checked}  # which Detectron2 adds


def _plain(value: Any) -> Any:
    """With Python's numbers for NumPy's, on which Detectron2 trains as well: its own tutorial makes
    boxes of them. And text for a path."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def _unwritable(dicts: Sequence[Mapping[str, Any]], name: str) -> Iterator[Finding]:
    """NumPy's numbers where Detectron2 leaves them in what it writes as JSON."""
    for d in dicts:
        values = [("image_id", d.get("image_id"))]
        values += [(k, a[k]) for a in d.get("annotations", ()) for k in _WRITTEN if k in a]
        for key, value in values:
            if not _is_json(value):
                text = f"'{key}' is {' '.join(repr(value).split()):.60}, which COCO's evaluation "
                text += "cannot write as JSON: make Python's numbers of it, by .tolist()"
                yield Finding("numbers of NumPy", ERROR, name, text, d.get("image_id"))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, default=_as_text)
    except (TypeError, ValueError):
        return False
    return True


def _as_text(value: Any) -> str:
    """Of run lengths, as Detectron2 does it.

    Raises:
        TypeError: for anything but bytes.
    """
    if isinstance(value, bytes):
        return value.decode("ascii")
    raise TypeError

"""Data sets in Pascal VOC's layout: ``Annotations/*.xml``, ``ImageSets/Main/<split>.txt`` and
``JPEGImages``.

Detectron2 has a loader for VOC's own years. It reads the split with NumPy's ``loadtxt``, which
fails on a single line and parts names at spaces and '#', and takes every image for a .jpg.
"""

import functools
import glob
import hashlib
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple
from xml.etree import ElementTree

from detectron2.structures import BoxMode

from d2kd.errors import UserError

from .images import ENDINGS, refuse_outside

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocSplit(NamedTuple):
    """What the files of a split say."""

    digest: str  # of the split and all annotations
    classes: Tuple[str, ...]  # of all splits, in the order of the alphabet


def split_file(folder: str, split: str) -> str:
    """The file that names the images of a split."""
    return os.path.join(folder, "ImageSets", "Main", f"{split}.txt")


@functools.lru_cache(maxsize=16)
def open_voc(names: str, annotations: str, mtime: int) -> VocSplit:
    """The classes are those of all splits, so that training and validation number them alike.

    Args:
        names: the file that names the images of the split.
        annotations: the folder of all XML files, which may lie in folders below.
        mtime: of ``names``: it is read once per state of that file.

    Raises:
        UserError: if an XML is broken, or none names a class.
    """
    digest, classes = hashlib.sha256(), set()
    files = glob.glob(os.path.join(glob.escape(annotations), "**", "*.xml"), recursive=True)
    for path in [names, *sorted(files)]:
        with open(path, "rb") as f:
            content = f.read()
        digest.update(content)
        if path != names:
            root = _parsed(content, path)
            classes.update(map(_name, root.findall("object")))
    if not classes:
        raise UserError(f"{annotations} names no class: give an XML with objects per image")
    return VocSplit(digest.hexdigest(), tuple(sorted(classes)))


def load_voc(folder: str, split: str, classes: Sequence[str]) -> List[Dict[str, Any]]:
    """The split in Detectron2's format, as ``load_voc_instances`` gives it.

    Args:
        folder: laid out as VOC's.
        split: ``train``, ``val`` ...
        classes: names, in the order of their numbers.

    Raises:
        UserError: if an annotation is missing or broken, or an image is in another folder.
    """
    names = split_file(folder, split)
    with open(names, encoding="utf-8-sig", errors="replace") as f:
        ids = [line.strip() for line in f if line.strip()]
    dicts = [_entry(folder, id, classes, names) for id in ids]
    refuse_outside(dicts, [os.path.join(folder, "JPEGImages")], names)
    return dicts


def _entry(folder: str, id: str, classes: Sequence[str], names: str) -> Dict[str, Any]:
    path = os.path.join(folder, "Annotations", f"{id}.xml")
    if not os.path.isfile(path):
        raise UserError(
            f"{names} names '{id}', but {path} does not exist: give one name per line, without the "
            "image's ending, and an XML for each"
        )
    with open(path, "rb") as f:
        root = _parsed(f.read(), path)
    height, width = (int(float(root.findtext(f"size/{side}"))) for side in ("height", "width"))
    return {
        "file_name": _image(os.path.join(folder, "JPEGImages", id)),
        "image_id": id,
        "height": height,
        "width": width,
        "annotations": [_box(obj, classes, path) for obj in root.findall("object")],
    }


def _image(stem: str) -> str:
    """With an ending that is there; else with VOC's own, .jpg, for the message."""
    endings = [x for ending in (".jpg", *ENDINGS) for x in (ending, ending.upper())]
    return next((stem + x for x in endings if os.path.isfile(stem + x)), f"{stem}.jpg")


def _box(obj: ElementTree.Element, classes: Sequence[str], path: str) -> Dict[str, Any]:
    name = _name(obj)
    if name not in classes:
        known = ", ".join(classes)
        raise UserError(
            f"{path} has the class '{name}', expected one of {known:.200}: the annotations have "
            "changed since the run began; start a new one"
        )
    x1, y1, x2, y2 = (float(obj.findtext(f"bndbox/{corner}")) for corner in _CORNERS)
    # VOC counts pixels from 1 and means the last one, too; Detectron2 counts from 0
    box = [x1 - 1, y1 - 1, x2, y2]
    return {"category_id": classes.index(name), "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}


def _name(obj: ElementTree.Element) -> str:
    """The class of an object; some tools break the line inside of it."""
    return (obj.findtext("name") or "").strip()


def _parsed(content: bytes, path: str) -> ElementTree.Element:
    """
    Raises:
        UserError: for what is no XML, or lacks the size of its image or an object's name or box.
    """
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path} is not valid XML ({error}): was it copied completely?") from error
    objects = root.findall("object")
    if not all(map(_name, objects)):
        raise UserError(f"{path} has an object without a name: name its class")
    for side in ("width", "height"):
        _check_number(root.findtext(f"size/{side}"), f"{path}: size/{side}", whole=True)
    for obj in objects:
        of = f"of '{_name(obj)}'"
        for corner in _CORNERS:
            _check_number(obj.findtext(f"bndbox/{corner}"), f"{path}: bndbox/{corner} {of}")
    return root


def _check_number(text: Optional[str], place: str, whole: bool = False) -> None:
    """
    Raises:
        UserError: for a text that is no number of pixels.
    """
    try:
        is_number = float(text or "").is_integer() or not whole
    except ValueError:
        is_number = False
    if not is_number:
        raise UserError(f"{place} is {text!r}, expected pixels")

"""Data sets in YOLO's layout: a YAML that names the classes and where the images are, and a text
file of boxes per image, which globox reads."""

import glob
import hashlib
import os
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

import yaml
from detectron2.structures import BoxMode
from PIL import Image

from d2kd.errors import UserError
from d2kd.safe_yaml import plain_yaml

from .images import ENDINGS, EXIF_ORIENTATION, SIDEWAYS

_TEXT = "utf-8-sig"  # UTF-8, with a byte-order mark or without, as editors of Windows write it


class YoloSplit(NamedTuple):
    """One split of a data set."""

    images: Tuple[str, ...]  # paths
    classes: Tuple[str, ...]  # names, in the order of their numbers
    digest: str  # of the YAML and all text files


def open_split(path: str, split: str) -> YoloSplit:
    """
    Args:
        path: of the YAML, with ``names`` and, per split, a folder of images, a text file of their
            paths, or a list of these; relative to ``path`` in it, or else to its own folder.
        split: ``train``, ``val`` ...

    Raises:
        UserError: if the YAML lacks these, or something that it names is not there.
    """
    with open(path, "rb") as f:
        text = f.read()
    try:
        content = plain_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content.get(split):
        raise UserError(f"{path} has no '{split}': give the key that says where the images are")
    classes = _classes(content.get("names"), path)
    root = os.path.join(os.path.dirname(path), str(content.get("path") or ""))
    places = content[split] if isinstance(content[split], list) else [content[split]]
    images = tuple(x for place in places for x in _images(_place(root, str(place)), path))
    digest = hashlib.sha256(text)
    for image in images:
        digest.update(os.path.basename(image).encode())
        label = _label_file(image)
        if os.path.isfile(label):
            with open(label, "rb") as f:
                digest.update(f.read())
    return YoloSplit(images, classes, digest.hexdigest())


def load_yolo(path: str, split: str) -> List[Dict[str, Any]]:
    """The split in Detectron2's format. An image without a text file has no objects.

    Raises:
        UserError: see :func:`open_split`; or if globox is not installed, or a text file has a line
            that is no box of a known class.
    """
    opened = open_split(path, split)
    return [_entry(i, image, len(opened.classes)) for i, image in enumerate(opened.images)]


def _classes(names: Any, path: str) -> Tuple[str, ...]:
    classes = _in_order(names) if isinstance(names, dict) else names
    if not isinstance(classes, list) or not classes or not all(isinstance(x, str) for x in classes):
        raise UserError(f"{path}: 'names' is {names!r:.60}: give the classes in order, from 0")
    for name in classes:
        if classes.count(name) > 1:
            raise UserError(f"{path}: 'names' has '{name}' twice: rename one")
    return tuple(classes)


def _in_order(names: Mapping[Any, Any]) -> List[Any]:
    """By their numbers, which may be in quotes; None where one is missing."""
    numbered = {int(k) if isinstance(k, str) and k.isdecimal() else k: names[k] for k in names}
    return [numbered.get(i) for i in range(len(names))]


def _place(root: str, place: str) -> str:
    """Where the images of a split are. Roboflow writes ``../train/images`` for a folder beside the
    YAML: what is not there is looked for without ``../``, as YOLO's own training does."""
    given, beside = (os.path.join(root, p) for p in (place, re.sub(r"^(\.\./)+", "", place)))
    return beside if os.path.exists(beside) and not os.path.exists(given) else given


def _images(place: str, path: str) -> List[str]:
    if os.path.isdir(place):
        found = glob.glob(os.path.join(glob.escape(place), "**", "*"), recursive=True)
        images = sorted(x for x in found if x.lower().endswith(ENDINGS))
        if not images:
            raise UserError(f"{path} names {place}, which holds no image ({', '.join(ENDINGS)})")
        return images
    if os.path.isfile(place):
        with open(place, encoding=_TEXT, errors="replace") as f:
            lines = [line.strip() for line in f]
        return [os.path.join(os.path.dirname(place), line) for line in lines if line]
    raise UserError(f"{path} names {place}, which does not exist: give a folder of images")


def _label_file(image: str) -> str:
    """Beside the image, or in the folder ``labels`` that stands for its folder ``images``."""
    before, images, after = image.rpartition(f"{os.sep}images{os.sep}")
    image = f"{before}{os.sep}labels{os.sep}{after}" if images else image
    return f"{os.path.splitext(image)[0]}.txt"


def _entry(number: int, image: str, num_classes: int) -> Dict[str, Any]:
    try:
        width, height = _size(image)
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"image {image} cannot be read ({error}): repair it") from error
    label = _label_file(image)
    boxes = _boxes(label, (width, height), num_classes) if os.path.isfile(label) else []
    return {
        "file_name": image,
        "image_id": number,
        "width": width,
        "height": height,
        "annotations": boxes,
    }


def _size(image: str) -> Tuple[int, int]:
    """Width and height of the upright image; its pixels are not read."""
    with Image.open(image) as opened:
        width, height = opened.size
        turned = opened.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    return (height, width) if turned else (width, height)


def _boxes(label: str, size: Tuple[int, int], num_classes: int) -> List[Dict[str, Any]]:
    try:
        from globox import BoundingBox
        from globox.errors import ParsingError
    except ImportError as error:
        raise UserError("YOLO's layout is read by globox: pip install 'd2kd[yolo]'") from error
    try:
        with open(label, encoding=_TEXT) as f:
            found = [BoundingBox.from_yolo_v5(x, image_size=size) for x in f if x.strip()]
    except (OSError, ParsingError, ValueError, AssertionError) as error:
        raise UserError(
            f"{label} cannot be read ({error}): expected 'class x y width height' per line, the "
            "class by its number, the box relative to the image"
        ) from error
    for box in found:
        if not (box.label.isdecimal() and int(box.label) < num_classes):
            raise UserError(
                f"{label} has the class '{box.label}', expected a number below {num_classes}, the "
                "number of 'names'"
            )
    return [
        {
            "bbox": list(box.ltrb),
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": int(box.label),
            "iscrowd": 0,
        }
        for box in found
    ]

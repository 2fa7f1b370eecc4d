"""What ``d2kd predict`` leaves: a drawn picture per image, and all detections in one JSON file."""

import json
import logging
import os
from typing import Any, Dict, List, NamedTuple, Sequence, Set

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

from d2kd.errors import UserError
from d2kd.labels import as_label
from d2kd.writing import atomic_write, cannot_write

from .predictor import Predictor

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.json"
_BOXES = "x and y of the upper left corner, width, height; pixels of the upright image"
# Pixels that the longer side of a picture has at least, for the letters to be read
_SHOWN = 640


class Summary(NamedTuple):
    """What became of the images."""

    images: int  # that were read
    detections: int
    skipped: List[str]  # paths of those that could not be read


def predict_into(
    folder: str,
    predictor: Predictor,
    paths: Sequence[str],
    classes: Sequence[str],
    threshold: float,
) -> Summary:
    """Writes ``predictions.json`` and a JPEG per image.

    Args:
        folder: is made; has to be empty.
        predictor: the detector.
        paths: of the images; one that cannot be read is named in the log and left out.
        classes: names in the order of the predictions; numbers stand for unknown ones.
        threshold: lowest score of a detection that is kept.

    Raises:
        UserError: if the folder holds something, or cannot be written to, or no image can be read.
    """
    _make_empty(folder)
    pictures = _picture_names(paths)
    images, skipped = [], []
    for path in paths:
        try:
            image = predictor.read(path)
        except UserError as error:
            logger.warning(f"Skipped: {error}")
            skipped.append(path)
            continue
        found = predictor(image)
        found = found[found.scores >= threshold]
        drawn = _draw(convert_image_to_rgb(image, predictor.input_format), found, classes)
        _write_picture(os.path.join(folder, pictures[path]), drawn)
        images.append(_entry(path, pictures[path], found, classes))
    if not images:
        raise UserError("none of the files is an image that can be read: give others")
    content = {
        "boxes": _BOXES,
        "threshold": threshold,
        "classes": list(classes),
        "images": images,
        "skipped": skipped,
    }
    with atomic_write(os.path.join(folder, PREDICTIONS)) as f:
        json.dump(content, f, indent=1)
    return Summary(len(images), sum(len(x["detections"]) for x in images), skipped)


def _make_empty(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        occupied = os.listdir(folder)
    except OSError as error:
        raise UserError(cannot_write(folder, error)) from error
    if occupied:
        raise UserError(
            f"the folder {folder} holds {occupied[0]} already: remove it, or give another --output"
        )


def _picture_names(paths: Sequence[str]) -> Dict[str, str]:
    """A name per image; those of images of the same name in several folders are numbered."""
    names: Dict[str, str] = {}
    taken: Set[str] = set()
    for path in paths:
        stem, number = os.path.splitext(os.path.basename(path))[0], 1
        name = f"{stem}.jpg"
        while name in taken:
            number += 1
            name = f"{stem}_{number}.jpg"
        names[path] = name
        taken.add(name)
    return names


def _name(index: int, classes: Sequence[str]) -> str:
    return classes[index] if index < len(classes) else str(index)


def _entry(path: str, picture: str, found: Instances, classes: Sequence[str]) -> Dict[str, Any]:
    height, width = found.image_size
    detections = instances_to_coco_json(found, path)
    for detection in detections:
        del detection["image_id"]
        # Not the ids of an annotation file: a detector counts its classes from 0
        detection["class_index"] = detection.pop("category_id")
        detection["class"] = _name(detection["class_index"], classes)
    return {
        "file": os.path.abspath(path),
        "picture": picture,
        "height": height,
        "width": width,
        "detections": detections,
    }


def _draw(image: np.ndarray, found: Instances, classes: Sequence[str]) -> np.ndarray:
    names = list(classes) or [str(i) for i in range(max(found.pred_classes, default=-1) + 1)]
    metadata = Metadata(thing_classes=list(map(as_label, names)))
    scale = max(1.0, _SHOWN / max(image.shape[:2]))
    return Visualizer(image, metadata, scale).draw_instance_predictions(found).get_image()


def _write_picture(path: str, image: np.ndarray) -> None:
    _, content = cv2.imencode(".jpg", image[:, :, ::-1])
    with atomic_write(path, "wb") as f:
        f.write(content.tobytes())

"""Shapes on disk, in COCO's format.

<folder>/train/000000.jpg …   <folder>/val/…
<folder>/annotations/instances_{train,val}.json
<folder>/manifest.json        written last: what was drawn, and that it is complete
"""

import json
import logging
import os
import shutil
from typing import Optional

import cv2
from iopath.common.file_io import file_lock
from tqdm import tqdm

from d2kd.errors import UserError

from .outlines import keyhole
from .shapes import SPLITS, VERSION, Shape, ShapesSpec, draw_image

logger = logging.getLogger(__name__)

JPEG_QUALITY = 95
MANIFEST = "manifest.json"


def annotation_file(folder: str, split: str) -> str:
    """Path of the COCO JSON of a split."""
    return os.path.join(folder, "annotations", f"instances_{split}.json")


def prepare_shapes(spec: ShapesSpec, folder: str, seed: Optional[int] = None) -> None:
    """Makes sure that the data set lies complete in a folder; draws it there if there is none.

    Several processes may ask at once: one draws, the others wait for it.

    Args:
        folder: of the data set itself, for instance ``datasets/shapes_tiny``.
        seed: of the drawing; None accepts what is there and draws with seed 0.

    Raises:
        UserError: the folder holds something else (never overwritten) or cannot be written.
    """
    folder = os.path.abspath(folder)
    if _is_complete(spec, folder, seed):
        return
    try:
        with file_lock(folder):
            if not _is_complete(spec, folder, seed):
                _write(spec, folder, seed or 0)
    except OSError as error:
        raise UserError(
            f"cannot write the data set {spec.name} to {folder} ({error}): "
            "set DETECTRON2_DATASETS to a folder that can be written"
        ) from error


def _manifest(spec: ShapesSpec, seed: int) -> dict:
    return {"name": spec.name, "version": VERSION, "seed": seed, "images": spec.images}


def _is_complete(spec: ShapesSpec, folder: str, seed: Optional[int]) -> bool:
    """Whether the wanted set is there; False when there is nothing or an empty folder.

    Raises:
        UserError: something else is there.
    """
    if not os.path.lexists(folder) or (os.path.isdir(folder) and not os.listdir(folder)):
        return False
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            found = json.load(file)
        wanted = _manifest(spec, found["seed"] if seed is None else seed)
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{folder} exists but holds no complete {spec.name} (no readable {MANIFEST}): "
            "move or delete it, or choose another folder"
        ) from None
    if found != wanted:
        raise UserError(
            f"{folder} holds {found}, expected {wanted}: "
            "move or delete it to draw the set anew, or choose another folder"
        )
    return True


def _write(spec: ShapesSpec, folder: str, seed: int) -> None:
    """Draws everything into a folder beside, then renames it: a killed run leaves no half set."""
    logger.info(
        f"Drawing {spec.name} ({sum(spec.images.values())} images, seed {seed}) into {folder}"
    )
    partial = folder + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(os.path.join(partial, "annotations"))
    with _progress(spec) as progress:
        for split in SPLITS:
            os.makedirs(os.path.join(partial, split))
            content = _draw_split(spec, seed, split, progress, os.path.join(partial, split))
            _write_json(annotation_file(partial, split), content)
    _write_json(os.path.join(partial, MANIFEST), _manifest(spec, seed))
    os.rename(partial, folder)


def _progress(spec: ShapesSpec) -> tqdm:
    total = sum(spec.images.values())
    # The small set is there before a progress bar could be read.
    return tqdm(total=total, desc=spec.name, unit="image", disable=total < 5000)


def _write_json(path: str, content: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)


def _draw_split(spec: ShapesSpec, seed: int, split: str, progress: tqdm, folder: str) -> dict:
    """Draws a split, writes its images into a folder, and returns its COCO JSON."""
    images, annotations = [], []
    for index in range(spec.images[split]):
        image, objects = draw_image(spec, seed, split, index)
        height, width = image.shape[:2]
        name = f"{index:06d}.jpg"
        _write_image(os.path.join(folder, name), image)
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
        annotations += [_annotation(index + 1, shape) for shape in objects]
        progress.update()
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(spec.classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write_image(path: str, image) -> None:
    if not cv2.imwrite(path, image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise OSError(f"{path} could not be written")


def _annotation(image_id: int, shape: Shape) -> dict:
    x0, y0, x1, y1 = (round(x, 2) for x in shape.box.tolist())
    width, height = round(x1 - x0, 2), round(y1 - y0, 2)
    polygon = [round(x, 2) for x in keyhole(shape.contours).ravel().tolist()]
    return {
        "image_id": image_id,
        "category_id": shape.label + 1,
        "bbox": [x0, y0, width, height],
        "segmentation": [polygon],
        # Of the box, not of the polygon as in COCO: small, medium and large mean the same in the
        # box APs and in the mask APs.
        "area": round(width * height, 2),
        "iscrowd": 0,
    }

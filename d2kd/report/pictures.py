"""Pictures of a page: detections side by side, and maps over images."""

import base64
from typing import Callable, Dict, List, NamedTuple, Sequence

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

from d2kd.labels import as_label

from .gradient_maps import GradientMaps, Maps
from .models import Shown

SCORE = 0.3  # detections below are not drawn
_DRAWN = 240  # pixels of the shorter side on which boxes and words are drawn, at least
_LARGE = 250  # pixels of the longer side of a picture that shows detections, at most
_SMALL = 150  # of one that shows a map
_OPAQUE = 0.65  # of a map over its image


class Grid(NamedTuple):
    """Pictures in rows and columns."""

    headers: Sequence[str]  # of the columns
    rows: List[Dict[str, str]]  # data addresses by the header of their column
    labels: Sequence[str]  # of the rows


def side_by_side(shown: Shown, found: Dict[str, List[Instances]], num_classes: int) -> Grid:
    """The ground truth of every image, and what each detector finds in it.

    Args:
        shown: the images.
        found: per detector the detections in every image.
        num_classes: of the student; a detector may know others, which have no names here.
    """
    rows = []
    for i, entry in enumerate(shown.dicts):
        image = read_image(entry["file_name"], format="RGB")
        truth = _canvas(image, shown.metadata).draw_dataset_dict(entry).get_image()
        row = {"ground truth": _address(truth, _LARGE)}
        for name, instances in found.items():
            drawn = _detections(image, shown.metadata, instances[i], num_classes)
            row[name] = _address(drawn, _LARGE)
        rows.append(row)
    return Grid(["ground truth", *found], rows, [""] * len(rows))


def _detections(image, metadata, instances: Instances, num_classes: int) -> np.ndarray:
    kept = instances[instances.scores > SCORE]
    known = not len(kept) or int(kept.pred_classes.max()) < num_classes
    canvas = _canvas(image, metadata if known else Metadata())
    return canvas.draw_instance_predictions(kept).get_image()


def _canvas(image: np.ndarray, metadata: Metadata) -> Visualizer:
    names = list(map(as_label, metadata.get("thing_classes", ())))
    metadata = Metadata(thing_classes=names) if names else Metadata()
    return Visualizer(image, metadata, scale=max(1.0, _DRAWN / min(image.shape[:2])))


def map_rows(
    cfg: CfgNode, inputs: Sequence[dict], times: Dict[str, Maps], strides: Dict[str, int]
) -> Grid:
    """Maps over the images, a row per image and time, a column per level. All have one scale.

    Args:
        cfg: the student's, for the channel order.
        inputs: the images as the student got them.
        times: maps per time, such as "before".
        strides: of every level.
    """
    names = list(dict.fromkeys(name for maps in times.values() for name in maps))
    values = torch.cat([x.flatten() for maps in times.values() for x in maps.values()])
    top = float(np.quantile(values.numpy(), 0.999)) or 1.0
    rows, labels = [], []
    for i, x in enumerate(inputs):
        image = convert_image_to_rgb(x["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
        for time, maps in times.items():
            row = {n: _overlaid(image, m[i].numpy() / top, strides[n]) for n, m in maps.items()}
            drawn = {name: _address(picture, _SMALL) for name, picture in row.items()}
            rows.append({"image": _address(image, _SMALL), **drawn})
            labels.append(time)
    return Grid(["image", *names], rows, labels)


def _overlaid(image: np.ndarray, level: np.ndarray, stride: int) -> np.ndarray:
    """A map over an image.

    Args:
        image: (H, W, 3), RGB.
        level: (h, w), from 0 to 1; of the padded batch, whose top left corner is the image.
        stride: pixels of the image per value.
    """
    height, width = image.shape[:2]
    large = level.repeat(stride, axis=0).repeat(stride, axis=1)[:height, :width]
    colours = matplotlib.colormaps["viridis"](large)[..., :3] * 255
    return (1 - _OPAQUE) * image[: large.shape[0], : large.shape[1]] + _OPAQUE * colours


def _address(image: np.ndarray, side: int) -> str:
    """An image (H, W, 3), RGB, as a data address, its longer side being as long as given."""
    scale = side / max(image.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    resized = cv2.resize(image.astype(np.uint8), None, fx=scale, fy=scale, interpolation=way)
    quality = (cv2.IMWRITE_JPEG_QUALITY, 85)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(resized, cv2.COLOR_RGB2BGR), quality)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"


def before_and_after(
    found: Dict[str, GradientMaps], choose: Callable[[GradientMaps], Dict[str, Maps]]
) -> Dict[str, Dict[str, Maps]]:
    """By name, the maps of every time that has them; those that stay as they are, once."""
    times: Dict[str, Dict[str, Maps]] = {}
    for time, at_time in found.items():
        for name, maps in choose(at_time).items():
            times.setdefault(name, {})[time] = maps
    return {
        name: {"": [*rows.values()][0]} if _same(rows) else rows for name, rows in times.items()
    }


def _same(rows: Dict[str, Maps]) -> bool:
    first, *others = rows.values()
    equal = [
        x.keys() == first.keys() and all(torch.equal(x[k], first[k]) for k in x) for x in others
    ]
    return bool(others) and all(equal)

"""Pictures of what methods look at."""

import textwrap
from typing import Dict, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from d2kd.labels import as_label

from .maps import Attention, MethodMaps


def draw(cfg: CfgNode, found: MethodMaps) -> Figure:
    """One row per image and kind of maps, the image with its objects, then the map of every level;
    below, a row for the attention.

    Args:
        cfg: of the recipe.
        found: from :func:`~d2kd.visualization.maps.collect_maps`.
    """
    maps, attention = found.maps, found.attention
    rows = [(x, name, i) for i, x in enumerate(found.inputs) for name in maps]
    columns = 1 + max([len(levels) for levels in maps.values()], default=1)
    height = len(rows) + (attention is not None)
    figure = Figure(figsize=(3 * columns, 3 * height), dpi=100)
    axes = figure.subplots(height, columns, squeeze=False)
    for a in axes.flat:
        a.axis("off")
    for row, (x, name, i) in zip(axes, rows):
        image = convert_image_to_rgb(x["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
        extent = (0, image.shape[1], image.shape[0], 0)
        row[0].imshow(_with_objects(cfg, image, x["instances"]), extent=extent)
        row[0].set_title(textwrap.fill(name, 26))
        _draw_levels(row[1:], image, {k: x[i] for k, x in maps[name].items()}, found.strides)
    if attention is not None:
        _plot(attention, figure.add_subplot(axes[-1, 0].get_gridspec()[-1, :]))
    figure.tight_layout()
    return figure


def _draw_levels(
    axes: np.ndarray, image: np.ndarray, levels: Dict[str, Tensor], strides: Dict[str, int]
) -> None:
    height, width = image.shape[:2]
    for a, (name, level) in zip(axes, levels.items()):
        # The map covers the padded batch, whose top left corner is the image.
        (h, w), stride = level.shape, strides[name]
        a.imshow(image, extent=(0, width, height, 0))
        extent = (0, w * stride, h * stride, 0)
        a.imshow(level, extent=extent, alpha=0.6, vmin=0, vmax=1)
        a.set_title(f"{name}, stride {stride}")


def mean_by_size(attention: Attention) -> Tuple[np.ndarray, np.ndarray]:
    """The regions' mean weights in steps of half an octave: sizes (S,), weights (L, S)."""
    steps = np.round(2 * np.log2(attention.sizes.clip(min=1)))
    steps, place = np.unique(steps, return_inverse=True)
    counts = np.bincount(place)
    return 2 ** (steps / 2), np.stack([np.bincount(place, w) / counts for w in attention.weights])


def _plot(attention: Attention, axes: Axes) -> None:
    sizes, means = mean_by_size(attention)
    for name, mean in zip(attention.levels, means):
        axes.plot(sizes, mean, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set(title="GDetKD", xlabel="√area of a region, pixels", ylabel="mean attention")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _with_objects(cfg: CfgNode, image: np.ndarray, instances: Instances) -> np.ndarray:
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    labels = [as_label(metadata.thing_classes[c]) for c in instances.gt_classes.tolist()]
    canvas = Visualizer(image, metadata, scale=max(1.0, 400 / image.shape[0]))
    return canvas.overlay_instances(boxes=instances.gt_boxes, labels=labels).get_image()

#!/usr/bin/env python
"""Draws what a method looks at.

That is DeFeat's object masks and FRS's scores on every FPN level, and how much attention G-DetKD
pays to every level, over the size of regions:

    python tools/visualize.py configs/shapes/defeat_faster_rcnn_tiny.yaml --output masks.png
    python tools/visualize.py configs/shapes/gdetkd_faster_rcnn_tiny.yaml --output attention.png \\
        MODEL.WEIGHTS output/shapes/gdetkd_faster_rcnn_tiny/model_final.pth

Takes images as the training loader gives them, and the maps of one training step on them. Attention
is learned: it is that of a checkpoint of the recipe's run.
"""

import argparse
from typing import Dict, List, NamedTuple, Optional

import matplotlib
import numpy as np
import torch
from compare import read_config
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from torch import Tensor

from d2kd.engine import DistillTrainer
from d2kd.engine.checkpoint import StudentCheckpointer
from d2kd.errors import UserError
from d2kd.modeling import TeacherStudent, build_model

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NUM_IMAGES = 2
# Batches over which attention is averaged
NUM_BATCHES = 16


def defeat_masks(method, student, teacher, targets) -> Dict[int, Tensor]:
    return dict(zip([s.stride for s, _ in method.levels], method.masks(student, targets)))


def frs_scores(method, student, teacher, targets) -> Dict[int, Tensor]:
    strides = [student.family.levels[i].stride for i, _ in method.levels]
    return dict(zip(strides, method.scores(teacher)))


# Per method: its maps (N, h, w) by stride, from what its forward is given
MAPS = {"DeFeat": defeat_masks, "FRS": frs_scores}


def level_maps(model: TeacherStudent, inputs: List[dict]) -> Dict[str, Dict[int, Tensor]]:
    """The maps of every method that has some, from one training forward."""
    maps = {}

    def keep(name):
        return lambda method, views, _: maps.update({name: MAPS[name](method, *views)})

    for name in [n for n in MAPS if n in model.distillers]:
        model.distillers[name].register_forward_hook(keep(name))
    with torch.no_grad():
        model(inputs)
    return {name: levels for name, levels in maps.items() if levels}  # DeFeat may have none


class Attention(NamedTuple):
    """What G-DetKD's levels count in R regions."""

    levels: List[str]
    sizes: np.ndarray  # (R,), √area in pixels
    weights: np.ndarray  # (L, R)


def load_run(model: TeacherStudent, path: str) -> None:
    """Fills student and adapters with those of a run.

    Raises:
        UserError: if the file holds no adapters, or others.
    """
    saved = StudentCheckpointer(model.student).load(path)
    if "distillers" not in saved:
        raise UserError(
            f"MODEL.WEIGHTS is '{path}': G-DetKD's attention is learned, give a checkpoint of the "
            "recipe's run"
        )
    try:
        model.distillers.load_state_dict(saved["distillers"])
    except RuntimeError as e:
        raise UserError(
            f"MODEL.WEIGHTS is '{path}': its adapters are not those of this recipe"
        ) from e


def level_attention(model: TeacherStudent, batches: List[List[dict]]) -> Attention:
    """The weights of levels in all regions of some training forwards."""
    sizes, weights = [], []

    def keep(imitation, args, _):
        _, boxes, _ = args
        sizes.append(Boxes.cat(boxes).area().sqrt())
        weights.append(imitation.weights(*imitation.sides(*args)))

    imitation = model.distillers["GDetKD"].imitation
    handle = imitation.register_forward_hook(keep)
    with torch.no_grad():
        for inputs in batches:
            model(inputs)
    handle.remove()
    names = [level.name for level in imitation.matched]
    return Attention(names, torch.cat(sizes).cpu().numpy(), torch.cat(weights, 1).cpu().numpy())


def has_attention(model: TeacherStudent) -> bool:
    """Whether G-DetKD weighs levels in this recipe."""
    methods = dict(model.distillers.items())
    return "GDetKD" in methods and bool(getattr(methods["GDetKD"].imitation, "matched", None))


def draw(
    cfg: CfgNode,
    inputs: List[dict],
    maps: Dict[str, Dict[int, Tensor]],
    attention: Optional[Attention],
    path: str,
) -> None:
    """One row per image and method, the image with its objects, then the map of every level; below,
    a row for the attention."""
    rows = [(x, name, i) for i, x in enumerate(inputs) for name in maps]
    columns = 1 + max([len(levels) for levels in maps.values()], default=1)
    height = len(rows) + (attention is not None)
    _, axes = plt.subplots(height, columns, figsize=(3 * columns, 3 * height), squeeze=False)
    for a in axes.flat:
        a.axis("off")
    for row, (x, name, i) in zip(axes, rows):
        image = convert_image_to_rgb(x["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
        height, width = image.shape[:2]
        row[0].imshow(_with_objects(cfg, image, x["instances"]), extent=(0, width, height, 0))
        row[0].set_title(name)
        for a, (stride, level) in zip(row[1:], maps[name].items()):
            # The map covers the padded batch, whose top left corner is the image.
            h, w = level.shape[1:]
            extent = (0, w * stride, h * stride, 0)
            a.imshow(image, extent=(0, width, height, 0))
            a.imshow(level[i].float().cpu(), extent=extent, alpha=0.6, vmin=0, vmax=1)
            a.set_title(f"stride {stride}")
    if attention is not None:
        _plot(attention, plt.subplot(axes[-1, 0].get_gridspec()[-1, :]))
    plt.tight_layout()
    plt.savefig(path, dpi=100)


def mean_by_size(attention: Attention):
    """The regions' mean weights in steps of half an octave: sizes (S,), weights (L, S)."""
    steps = np.round(2 * np.log2(attention.sizes.clip(min=1)))
    steps, place = np.unique(steps, return_inverse=True)
    counts = np.bincount(place)
    return 2 ** (steps / 2), np.stack([np.bincount(place, w) / counts for w in attention.weights])


def _plot(attention: Attention, axes) -> None:
    sizes, means = mean_by_size(attention)
    for name, mean in zip(attention.levels, means):
        axes.plot(sizes, mean, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set(title="GDetKD", xlabel="√area of a region, pixels", ylabel="mean attention")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _with_objects(cfg: CfgNode, image, instances):
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    labels = [metadata.thing_classes[c] for c in instances.gt_classes.tolist()]
    canvas = Visualizer(image, metadata, scale=max(1.0, 400 / image.shape[0]))
    return canvas.overlay_instances(boxes=instances.gt_boxes, labels=labels).get_image()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a recipe")
    parser.add_argument("--output", required=True, help="the picture to write, such as masks.png")
    parser.add_argument("opts", nargs="*", help="KEY VALUE ...")
    args = parser.parse_intermixed_args()
    try:
        cfg = read_config(args.config, args.opts)
        cfg.SOLVER.IMS_PER_BATCH = NUM_IMAGES
        model = build_model(cfg).train()
        if not isinstance(model, TeacherStudent):
            raise UserError("DISTILL.METHODS is empty, or all weights are 0: nothing to show")
        attends = has_attention(model)
        if attends:
            load_run(model, cfg.MODEL.WEIGHTS)
        loader = iter(DistillTrainer.build_train_loader(cfg))
        inputs, attention = next(loader), None
        with EventStorage(cfg.SOLVER.MAX_ITER // 2):
            maps = level_maps(model, inputs)
            if attends:
                batches = [inputs, *(next(loader) for _ in range(NUM_BATCHES - 1))]
                attention = level_attention(model, batches)
        if not maps and attention is None:
            methods = list(cfg.DISTILL.METHODS)
            raise UserError(
                f"DISTILL.METHODS is {methods}: maps can be had of {list(MAPS)}, attention of "
                "GDetKD with MATCH soft"
            )
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    draw(cfg, inputs, maps, attention, args.output)
    drawn = [f"{name}, {len(levels)} levels" for name, levels in maps.items()]
    if attention is not None:
        drawn.append(f"GDetKD, {len(attention.levels)} levels, {len(attention.sizes)} regions")
    print(f"{args.output}: " + ", ".join(drawn))


if __name__ == "__main__":
    main()

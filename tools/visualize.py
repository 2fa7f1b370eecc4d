#!/usr/bin/env python
"""Draws what a method looks at: DeFeat's object masks, FRS's scores, on every FPN level.

python tools/visualize.py configs/shapes/defeat_faster_rcnn_tiny.yaml --output masks.png

Takes images as the training loader gives them, and the maps of one training step on them.
"""

import argparse
from typing import Dict, List

import matplotlib
import torch
from compare import read_config
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from torch import Tensor

from d2kd.engine import DistillTrainer
from d2kd.errors import UserError
from d2kd.modeling import TeacherStudent, build_model

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NUM_IMAGES = 2


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


def draw(cfg: CfgNode, inputs: List[dict], maps: Dict[str, Dict[int, Tensor]], path: str) -> None:
    """One row per image and method: the image with its objects, then the map of every level."""
    rows = [(x, name, i) for i, x in enumerate(inputs) for name in maps]
    columns = 1 + max(len(levels) for levels in maps.values())
    size = (3 * columns, 3 * len(rows))
    _, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
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
    plt.tight_layout()
    plt.savefig(path, dpi=100)


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
        inputs = next(iter(DistillTrainer.build_train_loader(cfg)))
        with EventStorage(cfg.SOLVER.MAX_ITER // 2):
            maps = level_maps(model, inputs)
        if not maps:
            methods = list(cfg.DISTILL.METHODS)
            raise UserError(f"DISTILL.METHODS is {methods}: maps can be had of {list(MAPS)}")
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    draw(cfg, inputs, maps, args.output)
    print(f"{args.output}: " + ", ".join(f"{k}, {len(v)} levels" for k, v in maps.items()))


if __name__ == "__main__":
    main()

"""Draws what a method looks at: FRS's scores, DeFeat's masks, G-DetKD's attention to FPN levels.

Takes images as the training loader gives them, and the maps of the first training step on them
(those of a trained student are in the report of its run). Attention is learned: it is that of a
checkpoint of the recipe's run, over the size of regions.

examples:
  d2kd visualize shapes/defeat/faster_rcnn_tiny.yaml --output masks.png
  d2kd visualize shapes/gdetkd/faster_rcnn_tiny.yaml --output attention.png \\
      MODEL.WEIGHTS output/shapes/gdetkd/faster_rcnn_tiny/model_final.pth
"""

import argparse
import os

from d2kd.config import read_config
from d2kd.errors import UserError
from d2kd.visualization.maps import collect_maps
from d2kd.visualization.pictures import draw
from d2kd.writing import atomic_write, refuse_no_folder

from .arguments import add_overrides

FORMATS = (".jpg", ".pdf", ".png", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a recipe, or a file")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the picture to write, such as masks.png"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    ending = os.path.splitext(args.output)[1].lower()
    if ending not in FORMATS:
        raise UserError(f"--output is '{args.output}': give a name with {', '.join(FORMATS)}")
    refuse_no_folder(args.output, "--output")
    cfg = read_config(args.config, args.opts)
    found = collect_maps(cfg)
    with atomic_write(args.output, "wb") as f:
        draw(cfg, found).savefig(f, format=ending[1:])
    print(f"{args.output}: {found}")

"""Explains a method, a recipe, a table of ablations or a config key.

Of a method: what it reads of student and teacher, the detectors that it works between, its keys
with defaults and their sources, its cost, its recipes. Of a recipe: what it is, what it is based
on, the row of a paper's table, the command. Of a table: what it is about, its rows. Of a key: what
it means and may be, and its default.

examples:
  d2kd explain CrossKD
  d2kd explain crosskd/gfl_R_50_R_101-ms-2x-mmdet_1x
  d2kd explain hgd/faster_rcnn_R_50_R_101-1x_1x_ablation
  d2kd explain DISTILL.FRS.CLS.WEIGHT
"""

import argparse

from d2kd.catalogue import explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a method, a recipe, a table, or a config key")


def run(args: argparse.Namespace) -> None:
    print(explain(args.name))

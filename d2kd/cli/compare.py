"""Trains configs over seeds and compares them in a table: means, deviations, gains.

A file of ablations (docs/training.md, "Tables") stands for all of its rows; the first row is the
baseline. Runs that are finished are not repeated, an interrupted one goes on. If one fails, the
others are still trained; the error at the end names it, and the same command repeats it. The table
is printed, and written as Markdown beside a figure and every run as data; from five seeds on, gains
have a paired t-test.

examples:
  d2kd compare shapes/baselines/fcos_tiny shapes/frs/fcos_tiny --seeds 1 2 3
  d2kd compare shapes/baselines/gfl_tiny shapes/ld/gfl_tiny --seeds 1 2 3 4 5 --jobs 2
  d2kd compare shapes/defeat/retinanet_tiny_ablation.yaml SOLVER.MAX_ITER 1000
  d2kd compare hgd/faster_rcnn_R_50_R_101-1x_1x_ablation.yaml --commands
"""

import argparse
import os
import re
from typing import List, Sequence

from d2kd.comparison.rows import check_rows, read_rows
from d2kd.comparison.runs import command
from d2kd.comparison.tables import CELLS, FIGURE, TABLE, compare
from d2kd.errors import UserError

from .arguments import add_overrides, until_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="recipes, files, ablations")
    parser.add_argument("--seeds", nargs="+", default=["1"], metavar="SEED", help="default: 1")
    parser.add_argument(
        "--output",
        default="output/compare",
        help="folder of the runs and the table; default: output/compare",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, which share cores and GPUs; default: 1",
    )
    parser.add_argument(
        "--commands", action="store_true", help="print the command of each run, train nothing"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    configs, after_configs = until_key([*args.configs, *args.opts])
    seeds, after_seeds = until_key(args.seeds)
    opts = [*after_configs, *after_seeds]
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}: give 1 or more")
    if not configs:
        raise UserError("what is to be compared? Give recipes, config files or files of ablations")
    rows = [row for name in configs for row in read_rows(name)]
    check_rows(rows, opts)
    runs = [(row, seed) for row in rows for seed in _numbers(seeds)]
    if args.commands:
        for row, seed in runs:
            print(command(row, seed, args.output, opts))
        return
    text, problem = compare(rows, _numbers(seeds), args.output, opts, args.jobs)
    if text:
        written = ", ".join((TABLE, CELLS, FIGURE))
        print(f"\n{text}\n\n{os.path.join(args.output, '')}: {written}", flush=True)
    if problem:
        raise UserError(f"{problem}; the same command trains those again, and no others")


def _numbers(seeds: Sequence[str]) -> List[int]:
    for seed in seeds:
        if not re.fullmatch("[0-9]{1,9}", seed):
            raise UserError(f"--seeds has '{seed:.20}': give whole numbers, 0 or more")
    if len(set(map(int, seeds))) < len(seeds):
        raise UserError(f"--seeds has one twice: {' '.join(seeds)}")
    return [int(seed) for seed in seeds]

"""Evaluates a detector: the student in a run's folder, or a config and its weights.

examples:
  d2kd eval output/shapes/frs/fcos_tiny
  d2kd eval output/run --val-json val.json --val-images images
  d2kd eval --config-file shapes/baselines/fcos_tiny_teacher.yaml \\
      MODEL.WEIGHTS d2kd://fcos_tiny_teacher.pth
"""

import argparse

from d2kd.engine.launch import start
from d2kd.engine.trained_run import open_run
from d2kd.errors import UserError

from .arguments import add_data, add_overrides, add_processes, overrides_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's folder, or its checkpoint")
    parser.add_argument("--config-file", default="", metavar="FILE", help="instead of a run")
    add_data(parser)
    add_processes(parser)
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    args.eval_only, args.resume, args.force_resume = True, False, False
    start(args, _choose)


def _choose(args: argparse.Namespace) -> None:
    if args.config_file:  # what stands first is no run, but an override
        args.opts = [*filter(None, [args.run]), *args.opts]
        args.opts = overrides_of(args)
    elif args.run:
        run = open_run(args.run)
        args.config_file = run.config_file if run.has_config() else run.student_file
        args.opts = [*run.here(), *overrides_of(args)]
    else:
        raise UserError("what is to be evaluated? Give a run's folder, or --config-file")

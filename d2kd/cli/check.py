"""Finds out in minutes what would fail in hours; nothing is written to the output folder.

Looks at the config, at the annotations and every image of both data sets, evaluates the
annotations themselves, builds teacher and student, takes a few steps, and says what the run will
need. Ends with status 1 if there are errors.

examples:
  d2kd check --config-file shapes/frs/fcos_tiny.yaml
  d2kd check --config-file my.yaml --train-json train.json --train-images photographs \\
      --val-json val.json --val-images photographs
  d2kd check --config-file coco.yaml --no-images --num-gpus 8 --teacher-ap 38.5 --images 500
"""

import argparse
import shlex
import sys
from typing import Optional

from d2kd.check import Part, TeacherAP, check_config, check_run
from d2kd.config import read_config
from d2kd.data.findings import ERROR, WARNING, count, summary
from d2kd.errors import UserError

from .arguments import add_data, add_overrides, overrides_of

_OWN_DATA = ("json", "images", "voc", "yolo")  # the options of each split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", default="", metavar="FILE", help="a file, or a recipe")
    parser.add_argument("--num-gpus", type=int, default=1, help="how many GPUs the run will have")
    parser.add_argument("--no-images", action="store_true", help="do not open every image")
    parser.add_argument(
        "--config-only", action="store_true", help="without data and the teacher's weights"
    )
    add_data(parser)
    group = parser.add_argument_group("the teacher's AP, on the first validation set")
    group.add_argument(
        "--teacher-ap", type=float, metavar="AP", help="also evaluate the teacher; its expected AP"
    )
    group.add_argument(
        "--images", type=int, default=0, metavar="N", help="for it, N images; default: all"
    )
    group.add_argument(
        "--tolerance", type=float, default=1.0, metavar="AP", help="for it, points; default: 1"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    if not args.config_file:
        raise UserError(
            "--config-file is missing: give a file or a recipe, such as shapes/frs/fcos_tiny.yaml"
        )
    if args.num_gpus < 1:
        raise UserError(f"--num-gpus is {args.num_gpus}: give 1 or more")
    cfg = read_config(args.config_file, overrides_of(args))
    if args.config_only:
        parts = check_config(cfg, debug=args.debug)
    else:
        parts = check_run(
            cfg,
            num_gpus=args.num_gpus,
            images=not args.no_images,
            teacher_ap=_teacher_ap(args),
            debug=args.debug,
        )
    findings = []
    for part in parts:
        _show(part)
        findings += part.findings
    errors, warnings = count(findings, ERROR), count(findings, WARNING)
    print(f"\nfound {errors} errors, {warnings} warnings")
    if errors:
        sys.exit(1)
    print(f"next: {_training(args)}")


def _teacher_ap(args: argparse.Namespace) -> Optional[TeacherAP]:
    if args.teacher_ap is None:
        return None
    return TeacherAP(args.teacher_ap, args.images, args.tolerance)


def _training(args: argparse.Namespace) -> str:
    """The command that trains what was checked."""
    words = ["d2kd", "train", "--config-file", args.config_file]
    for option in [f"{split}_{what}" for split in ("train", "val") for what in _OWN_DATA]:
        value = getattr(args, option)
        if value:
            values = [value] if isinstance(value, str) else value
            words += [f"--{option.replace('_', '-')}", *values]
    if args.num_gpus > 1:
        words += ["--num-gpus", str(args.num_gpus)]
    return shlex.join([*words, *args.opts])


def _show(part: Part) -> None:
    print(f"\n{part.name}: {'ok' if not part.findings else ''}".rstrip(": "))
    for line in (*part.lines, *summary(part.findings)):
        print(f"  {line}", flush=True)

"""Finds out in minutes what would fail in hours; nothing is written to the output folder.

Looks at the config, at the annotations and every image of both data sets, evaluates the
annotations themselves, builds teacher and student, takes a few steps, and says what the run will
need. Ends with status 1 if there are errors.

examples:
  d2kd check --config-file shapes/frs/fcos_tiny.yaml
  d2kd check --student COCO-Detection/retinanet_R_50_FPN_1x \\
      --teacher COCO-Detection/retinanet_R_101_FPN_3x
  d2kd check --config-file my.yaml --train-json train.json --train-images images \\
      --val-json val.json --val-images images
  d2kd check --config-file coco.yaml --no-images --num-gpus 8 --teacher-ap 38.5 --images 500
"""

import argparse
import os
import shlex
import sys
import tempfile
from typing import Iterator, Optional

from detectron2.config import CfgNode

from d2kd.check import Part, TeacherAP, check_run, check_without_data
from d2kd.command import typed_command
from d2kd.config import read_config
from d2kd.data.findings import ERROR, WARNING, count, summary
from d2kd.errors import UserError
from d2kd.pairing.finetune import is_trained
from d2kd.pairing.recipe import write_recipe

from .arguments import add_data, add_names, add_overrides, gives_names, overrides_of, plan_of

_OWN_DATA = ("json", "images", "voc", "yolo")  # the options of each split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", default="", metavar="FILE", help="a file, or a recipe")
    parser.add_argument("--num-gpus", type=int, default=1, help="how many GPUs the run will have")
    parser.add_argument("--no-images", action="store_true", help="do not open every image")
    parser.add_argument(
        "--config-only", action="store_true", help="without data and the teacher's weights"
    )
    add_names(parser)
    add_data(parser)
    group = parser.add_argument_group("the teacher's AP, on the first validation set")
    group.add_argument(
        "--teacher-ap", type=float, metavar="AP", help="also evaluate the teacher; its expected AP"
    )
    group.add_argument(
        "--images", type=int, default=0, metavar="N", help="to evaluate it on; default: all"
    )
    group.add_argument(
        "--tolerance", type=float, default=1.0, metavar="AP", help="points off; default: 1"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    if not (args.config_file or gives_names(args)):
        raise UserError(
            "--config-file is missing: give a file or a recipe, such as shapes/frs/fcos_tiny.yaml, "
            "or --student and --teacher"
        )
    if args.num_gpus < 0:
        raise UserError(f"--num-gpus is {args.num_gpus}: give 1 or more")
    args.num_gpus = max(args.num_gpus, 1)  # as training takes 0
    findings = []
    with tempfile.TemporaryDirectory(prefix="d2kd_check_") as folder:
        for part in _parts(args, folder):
            _show(part)
            findings += part.findings
    errors, warnings = count(findings, ERROR), count(findings, WARNING)
    print(f"\nfound {errors} errors, {warnings} warnings")
    if errors:
        sys.exit(1)
    print(f"next: {_training(args)}")


def _parts(args: argparse.Namespace, folder: str) -> Iterator[Part]:
    """
    Args:
        folder: for what the names amount to.
    """
    opts = overrides_of(args)
    if not gives_names(args):
        yield from _parts_of(args, read_config(args.config_file, opts), args.config_only)
        return
    plan = plan_of(args, opts, needs_weights=not args.config_only)
    print(plan, flush=True)
    if not plan.teacher or is_trained(plan.teacher_folder):
        cfg = read_config(write_recipe(folder, plan.recipe, []))
        yield from _parts_of(args, cfg, args.config_only)
    else:
        print("\nstep 1, the teacher", flush=True)
        teacher = write_recipe(os.path.join(folder, "teacher"), plan.teacher, [])
        yield from _parts_of(args, read_config(teacher), args.config_only)
        print("\nstep 2, the student, with a teacher of random weights", flush=True)
        plan.recipe["DISTILL"]["TEACHER"]["CONFIG"] = teacher
        cfg = read_config(write_recipe(folder, plan.recipe, []))
        yield from _parts_of(args, cfg, config_only=True)


def _parts_of(args: argparse.Namespace, cfg: CfgNode, config_only: bool) -> Iterator[Part]:
    if config_only:
        return check_without_data(cfg, debug=args.debug)
    return check_run(
        cfg,
        num_gpus=args.num_gpus,
        images=not args.no_images,
        teacher_ap=_teacher_ap(args),
        debug=args.debug,
    )


def _teacher_ap(args: argparse.Namespace) -> Optional[TeacherAP]:
    if args.teacher_ap is None:
        return None
    return TeacherAP(args.teacher_ap, args.images, args.tolerance)


def _training(args: argparse.Namespace) -> str:
    """The command that trains what was checked."""
    words = [*typed_command(), "train"]
    for option in ("config_file", "student", "teacher"):
        value = getattr(args, option)
        words += [f"--{option.replace('_', '-')}", value] if value else []
    words += [word for method in args.method for word in ("--method", method)]
    words += ["--finetune-teacher"] * args.finetune_teacher
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

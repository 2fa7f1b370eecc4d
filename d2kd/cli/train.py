"""Trains a student, with or without a teacher, or a plain detector; or evaluates one.

With --student and --teacher no YAML is needed: the method and its weights follow from the two and
are printed with the reason; the config that results is recipe.yaml in the run's folder.

examples:
  d2kd train --config-file shapes/frs/fcos_tiny.yaml
  d2kd train --config-file shapes/frs/fcos_tiny.yaml --resume
  d2kd train --config-file my.yaml --train-json train.json --train-images images \\
      --val-json val.json --val-images images SOLVER.MAX_ITER 1000
  d2kd train --student COCO-Detection/retinanet_R_50_FPN_1x \\
      --teacher COCO-Detection/retinanet_R_101_FPN_3x --method CrossKD
"""

import argparse
import os
import tempfile
from typing import List, Sequence

from d2kd.check.estimate import in_words, seconds_of_training
from d2kd.checkpoint import checkpoint_names, refuse_occupied
from d2kd.config import read_config
from d2kd.engine.folder_lock import hold_folder
from d2kd.engine.launch import processes_of, setup, start
from d2kd.engine.preflight import refuse_unwritable
from d2kd.engine.processes import place_by_torchrun
from d2kd.engine.scaling import scale_to_processes
from d2kd.errors import UserError
from d2kd.pairing import Plan
from d2kd.pairing.finetune import is_trained, train_teacher
from d2kd.pairing.recipe import RECIPE_YAML, write_recipe

from .arguments import (
    add_data,
    add_names,
    add_overrides,
    add_processes,
    gives_names,
    overrides_of,
    plan_of,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of Detectron2's ``train_net.py``, and d2kd's own."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="a file, or a recipe")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT_DIR")
    parser.add_argument(
        "--force-resume",
        action="store_true",
        help="as --resume, although settings or the teacher differ from those of the run",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    add_names(parser)
    add_data(parser)
    add_processes(parser)
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    start(args, _prepare)


def _prepare(args: argparse.Namespace) -> None:
    args.opts = overrides_of(args)
    if gives_names(args):
        _use_names(args)


def _use_names(args: argparse.Namespace) -> None:
    """Makes of the names what a config file would say, the teacher's own run included."""
    if args.eval_only:
        raise UserError("--eval-only does not go with --student, --teacher, --method")
    if args.finetune_teacher and place_by_torchrun(os.environ):
        raise UserError(
            "--finetune-teacher is a run of its own before this one, which torchrun cannot start: "
            "leave torchrun out and give --num-gpus"
        )
    plan = plan_of(args, args.opts)
    print(plan, flush=True)
    if not (args.resume or args.force_resume):
        refuse_occupied(plan.output)
    refuse_unwritable(plan.output)
    if args.machine_rank == 0:
        hold_folder(plan.output)
    if plan.teacher:
        _finetune(plan, args)
    args.config_file, args.opts = _write(plan, args), []
    print(f"recipe   {args.config_file}", flush=True)


def _write(plan: Plan, args: argparse.Namespace) -> str:
    """The recipe of the student's run. With ``--force-resume`` it takes the place of the one that
    is there, but only if the run can go on by it."""
    if args.force_resume:
        with tempfile.TemporaryDirectory() as folder:
            _set_up(write_recipe(folder, plan.recipe, []), args)
    return plan.write(replace=args.force_resume)


def _set_up(recipe: str, args: argparse.Namespace, opts: Sequence[str] = ()) -> None:
    """Refuses a run that could not start."""
    setup(argparse.Namespace(**{**vars(args), "config_file": recipe, "opts": list(opts)}))


def _finetune(plan: Plan, args: argparse.Namespace) -> None:
    """Both steps are shown with their times; the first one is taken."""
    if args.force_resume and checkpoint_names(plan.teacher_folder):  # changes are the student's
        first = os.path.join(plan.teacher_folder, RECIPE_YAML)
    else:
        first = plan.write_teacher()
    second, processes = _write(plan, args), processes_of(args)
    for number, what, path in ((1, "the teacher", first), (2, "the student", second)):
        cfg = scale_to_processes(read_config(path), processes)
        if number == 1 and is_trained(plan.teacher_folder):
            print(f"step 1   the teacher is trained already: {plan.teacher_folder}", flush=True)
            continue
        time = in_words(seconds_of_training(cfg, processes))
        images = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATION_STEPS
        steps = f"{cfg.SOLVER.MAX_ITER} iterations of {images} images"
        print(f"step {number}   {what}: {steps}, {time} without data and evaluation", flush=True)
    if not is_trained(plan.teacher_folder):
        # What keeps the student's run from starting is told now. It may start from the teacher
        below = os.path.join(os.path.realpath(plan.teacher_folder), "")
        from_teacher = os.path.realpath(cfg.MODEL.WEIGHTS).startswith(below)
        _set_up(second, args, ["MODEL.WEIGHTS", ""] if from_teacher else [])
        train_teacher(first, _process_options(args))


def _process_options(args: argparse.Namespace) -> List[str]:
    names = ("num_gpus", "num_machines", "machine_rank", "dist_url")
    return [word for x in names for word in (f"--{x.replace('_', '-')}", str(getattr(args, x)))]

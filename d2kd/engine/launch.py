"""The command line: ``python train_net.py --config-file …`` and ``d2kd-train``."""

import argparse
import re
import sys
from typing import List, Optional

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from d2kd.config import add_distill_config, load_yaml
from d2kd.errors import UserError
from d2kd.model_zoo import resolve_config

from .checkpoint import refuse_finished_run, write_student_yaml


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's parser, and ``--debug``."""
    parser = default_argument_parser()
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a run; sets up logging, seeds and the output folder.

    Raises:
        UserError: for a wrong config, or an output folder that holds a run.
    """
    if not args.config_file:
        raise UserError("--config-file is missing: give a YAML file, for instance one of configs/")
    args.config_file = resolve_config(args.config_file, "--config-file")
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, args.config_file, args.opts)
    cfg.freeze()
    if not (args.resume or args.eval_only):
        refuse_finished_run(cfg.OUTPUT_DIR)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2kd")
    return cfg


def run(args: argparse.Namespace) -> Optional[dict]:
    """One process of a run: trains, or evaluates the student with ``--eval-only``.

    Returns:
        the evaluation results.
    """
    from d2kd.modeling import build_detector
    from d2kd.modeling.weights import read_weights

    from .trainer import DistillTrainer

    cfg = setup(args)
    if args.eval_only:
        student = build_detector(cfg)
        unfilled = read_weights(student, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
        if unfilled:
            raise UserError(
                f"MODEL.WEIGHTS is '{cfg.MODEL.WEIGHTS}': it leaves {len(unfilled)} tensors of the "
                f"student unfilled, such as {unfilled[0]}; give a checkpoint of this student"
            )
        return DistillTrainer.test(cfg, student)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    write_student_yaml(cfg)
    return trainer.train()


def _run_reporting(args: argparse.Namespace) -> None:
    """Ends the process with one line and status 1 when the user can mend what is wrong."""
    try:
        run(args)
    except Exception as error:
        message = _user_message(error)
        if args.debug or message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def _user_message(error: Exception) -> Optional[str]:
    if isinstance(error, UserError):
        return str(error)
    # A name in the config that one of Detectron2's registries does not know
    match = re.search(r"No object named '(.+)' found in '(.+)' registry", str(error))
    return f"the config names '{match[1]}', unknown in the {match[2]} registry" if match else None


def main(argv: Optional[List[str]] = None) -> None:
    """Entry point; see ``--help``."""
    parser = argument_parser()
    args = parser.parse_args(argv)
    gpus = torch.cuda.device_count()
    if args.num_gpus > max(gpus, 1):
        parser.exit(1, f"error: --num-gpus is {args.num_gpus}, but torch sees {gpus}\n")
    try:
        launch(
            _run_reporting,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:  # which has said why
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

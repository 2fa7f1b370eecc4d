"""Starting a run: checking it, its processes, and what one of them does."""

import argparse
import logging
import os
import sys
from functools import partial
from typing import Callable, List, Optional

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from d2kd.checkpoint import (
    load_trained_weights,
    newest_checkpoint,
    refuse_missing,
    refuse_occupied,
    write_student_program,
    write_student_yaml,
)
from d2kd.config import read_config
from d2kd.data.classes import class_names_of
from d2kd.data.described import register_described
from d2kd.distillation import build_detector
from d2kd.errors import UserError
from d2kd.lazy import config_text, errors_in_words_of, is_lazy
from d2kd.model_zoo import FINAL_WEIGHTS
from d2kd.one_line import exit_on_user_error, exit_status

from .allocator import keep_freed_memory
from .folder_lock import hold_folder
from .logs import set_up_logs
from .preflight import refuse_not_evaluated, refuse_processes, refuse_unusable
from .processes import (
    Place,
    is_first_to_tell,
    place_by_torchrun,
    publish_run,
    receive_run,
    run_joined,
    start_processes,
    store_of_torchrun,
)
from .run_config import refuse_changed, refuse_short, write_run_config
from .scaling import scale_to_processes
from .stopping import forwarded_signals
from .summary import closing, opening
from .trainer import DistillTrainer
from .versions import record_versions

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a run. Nothing is written.

    Raises:
        UserError: for a wrong config, or one that cannot be run, or an output folder that holds
            another run.
    """
    if not args.config_file:
        raise UserError(
            "--config-file is missing: give a file or a recipe, such as shapes/frs/fcos_tiny.yaml"
        )
    args.resume = args.resume or args.force_resume
    cfg = read_config(args.config_file, args.opts)
    with errors_in_words_of(cfg):
        if args.eval_only:
            _choose_weights(cfg, args.resume)
            refuse_not_evaluated(cfg)
        else:
            _refuse_start(cfg, args)
            refuse_unusable(cfg)
        refuse_processes(cfg, args.num_gpus, processes_of(args), training=not args.eval_only)
    cfg.freeze()
    return cfg


def processes_of(args: argparse.Namespace) -> int:
    """How many processes a run has; with ``--num-gpus 0``, as for Detectron2, one."""
    return max(args.num_gpus * args.num_machines, 1)


def _choose_weights(cfg: CfgNode, resume: bool) -> None:
    """With ``--resume`` a run's newest checkpoint is evaluated, as in Detectron2."""
    saved = newest_checkpoint(cfg.OUTPUT_DIR) if resume else None
    if saved:
        cfg.MODEL.WEIGHTS = saved.path
    if not cfg.MODEL.WEIGHTS:
        final = os.path.join(cfg.OUTPUT_DIR, FINAL_WEIGHTS)
        raise UserError(
            "MODEL.WEIGHTS is empty, there is nothing to evaluate: give the student's checkpoint, "
            f"for instance 'MODEL.WEIGHTS {final}'"
        )
    refuse_missing(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")


def _refuse_start(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Whether a run may start or go on in its folder, and from its weights."""
    if not args.resume:
        refuse_occupied(cfg.OUTPUT_DIR)
    saved = newest_checkpoint(cfg.OUTPUT_DIR) if args.resume else None
    if saved is None:
        refuse_missing(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
        return
    processes = processes_of(args)
    refuse_short(scale_to_processes(cfg, processes), saved)
    if not args.force_resume:
        refuse_changed(cfg, saved, processes)


def set_up_process(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Data sets; logging and seeds as ``default_setup`` does them, but the run's ``config.yaml``
    stays as it is until training starts."""
    register_described(cfg)
    rank = comm.get_rank()
    set_up_logs(cfg.OUTPUT_DIR, rank)
    logger.debug(f"Rank of current process: {rank}. World size: {comm.get_world_size()}")
    logger.debug(f"Environment info:\n{collect_env_info()}")
    logger.debug(f"Command line arguments: {args}")
    logger.debug(f"Running with full config:\n{config_text(cfg)}")
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def run(args: argparse.Namespace, cfg: CfgNode) -> Optional[dict]:
    """One process of a run: trains, or evaluates the student with ``--eval-only``.

    Args:
        args: of the command line.
        cfg: from :func:`setup`.

    Returns:
        the evaluation results.
    """
    set_up_process(cfg, args)
    if args.eval_only:
        return evaluate(cfg)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if args.resume and not trainer.start_iter:
        logger.warning(f"'{cfg.OUTPUT_DIR}' holds no checkpoint: the run starts from the beginning")
    if trainer.start_iter and not args.force_resume:
        trainer.refuse_other_teacher()
    if trainer.is_finished():
        logger.warning(
            f"All {trainer.max_iter} steps are done, and the student was evaluated (metrics.json): "
            "nothing is left to do; --eval-only --resume evaluates it again"
        )
        return None
    if trainer.start_iter >= trainer.max_iter:
        logger.warning(f"All {trainer.max_iter} steps are done: the student is evaluated only")
    write_run_config(cfg)
    write_student = write_student_program if is_lazy(cfg) else write_student_yaml
    write_student(cfg)
    record_versions(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        logger.info(opening(trainer))
    results = trainer.train()
    if comm.is_main_process():
        logger.info(closing(trainer.cfg))
    return results


def evaluate(cfg: CfgNode) -> dict:
    """
    Raises:
        UserError: if ``MODEL.WEIGHTS`` does not fill the student, or was trained otherwise.
    """
    student = build_detector(cfg)
    text = load_trained_weights(
        student,
        cfg.MODEL.WEIGHTS,
        "MODEL.WEIGHTS",
        "the config",
        cfg.INPUT.FORMAT,
        class_names_of(cfg.DATASETS.TEST),
    )
    logger.info(f"The student's weights: {cfg.MODEL.WEIGHTS}, {text}")
    return DistillTrainer.test(cfg, student)


def _run_reporting(args: argparse.Namespace, cfg: CfgNode) -> None:
    with exit_on_user_error(args.debug), errors_in_words_of(cfg):
        run(args, cfg)


def _run_among(place: Place, store: dist.Store, args: argparse.Namespace, cfg: CfgNode) -> None:
    """:func:`_run_reporting` in one of several processes."""
    is_first = partial(is_first_to_tell, store)
    with exit_on_user_error(args.debug, is_first), errors_in_words_of(cfg):
        run_joined(place, store, cfg, partial(run, args, cfg))


def start(
    args: argparse.Namespace, prepare: Callable[[argparse.Namespace], None] = lambda args: None
) -> None:
    """All processes of a run, until they end; with torchrun, this one. A run that fails ends this
    process too.

    Args:
        args: as from Detectron2's ``default_argument_parser``, with ``force_resume`` and ``debug``.
        prepare: completes ``args``, once for all processes.

    Raises:
        UserError: see :func:`setup`.
    """
    place = place_by_torchrun(os.environ)
    if place is not None:
        _start_by_torchrun(place, args, prepare)
        return
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--num-machines needs --dist-url tcp://ADDRESS:PORT of the first machine")
    prepare(args)
    cfg = _set_up_and_hold(args)
    if processes_of(args) == 1:
        _run_reporting(args, cfg)
        return
    with forwarded_signals() as received:
        try:
            start_processes(_run_among, args, cfg)
        except (ProcessExitedException, ProcessRaisedException) as error:
            sys.exit(_status(error, received, args))


def _set_up_and_hold(args: argparse.Namespace) -> CfgNode:
    """:func:`setup`, and no other run trains in the folder while this process lives."""
    cfg = setup(args)
    if not args.eval_only and args.machine_rank == 0:
        with errors_in_words_of(cfg):
            hold_folder(cfg.OUTPUT_DIR)
            _refuse_start(cfg, args)  # another process may have trained there in the meantime
    return cfg


def _start_by_torchrun(
    place: Place, args: argparse.Namespace, prepare: Callable[[argparse.Namespace], None]
) -> None:
    """Process 0 sets the run up for all, as the process does that starts others itself."""
    store = store_of_torchrun()
    if place.rank == 0:
        if processes_of(args) > 1:
            raise UserError(
                f"torchrun has started {place.world_size} processes already: leave out --num-gpus, "
                "--num-machines and --machine-rank"
            )
        args.num_gpus = place.local_world_size
        args.num_machines = place.world_size // place.local_world_size
        prepare(args)
        publish_run(store, args, _set_up_and_hold(args))
    _run_among(place, store, *receive_run(store))


def _status(error: Exception, received: List[int], args: argparse.Namespace) -> int:
    """The status of a run one of whose processes ended."""
    if received:
        return exit_status(received[0])
    if isinstance(error, ProcessRaisedException):
        print(error, file=sys.stderr, flush=True)
        return 1
    if error.exit_code < 0:  # ended by a signal; whatever else ends a process says so itself
        advice = "" if args.eval_only else "; add --resume to go on"
        print(f"error: {error}{advice}", file=sys.stderr, flush=True)
        return exit_status(-error.exit_code)
    return error.exit_code

"""All that can be known of a run before it starts. Nothing is created or written at its place."""

import datetime
import logging
import os
import tempfile
from typing import Callable, Iterator, List, NamedTuple, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from d2kd.checkpoint import refuse_occupied
from d2kd.data.check import check_dataset_names, masks_needed
from d2kd.data.findings import ERROR, WARNING, Finding, count
from d2kd.data.images import check_images
from d2kd.data.loader import images_per_process
from d2kd.data.sets import inspect_dataset
from d2kd.distillation import distilled_methods, save_random_teacher
from d2kd.distillation.pair_report import WEIGHTS_FROM
from d2kd.engine.preflight import refuse_no_evaluation, refuse_settings
from d2kd.engine.scaling import scale_to_processes
from d2kd.errors import UserError, reason
from d2kd.lazy import errors_in_words_of
from d2kd.one_line import LOGGERS

from .evaluations import ap_of_annotations, ap_of_teacher
from .noise import build_for_training, try_on_noise
from .trial import try_steps

logger = logging.getLogger(__name__)

# Less than this, of a perfect 100, is a fault of the annotations
_PERFECT = 95.0
_COCO_DETECTIONS = 100  # of an image, that COCO's AP counts
# The logger that reports on teacher and student
_PAIR_REPORT = "d2kd.distillation.build"
# Its line on a teacher's weights where they are a passing file
_RANDOM = f"{WEIGHTS_FROM}random, for this check alone"


class Part(NamedTuple):
    """What one part of a check came to."""

    name: str
    lines: List[str]  # facts
    findings: List[Finding]  # what is wrong


class TeacherAP(NamedTuple):
    """What a teacher is expected to reach."""

    expected: float
    images: int  # of the validation set, evenly spread; 0 is all
    tolerance: float  # in points of AP


def check_run(
    cfg: CfgNode,
    *,
    num_gpus: int = 1,
    images: bool = True,
    teacher_ap: Optional[TeacherAP] = None,
    debug: bool = False,
) -> Iterator[Part]:
    """
    Args:
        cfg: of a run.
        num_gpus: that the run will have; the check itself takes one process.
        images: open all images, which takes minutes for 100 000 of them.
        teacher_ap: evaluate the teacher.
        debug: let exceptions of libraries through.

    Yields:
        the parts, as they are done. With data that cannot be used, the model is tried on noise.
    """
    settings = _attempt("config", cfg, lambda: _settings(cfg, num_gpus), debug)
    yield settings
    yield _attempt("output", cfg, lambda: _output(cfg), debug)
    usable = True
    for part in _data(cfg, images, debug):
        usable &= not count(part.findings, ERROR)
        yield part
    with tempfile.TemporaryDirectory(prefix="d2kd_check_") as folder:
        cfg = cfg if settings.findings else scale_to_processes(cfg, num_gpus)
        cfg = _of_one_process(cfg, 1 if settings.findings else num_gpus, folder)
        if not usable:
            noise = _attempt("model, on images of noise", cfg, lambda: _on_noise(cfg), debug)
            yield from _unless_said(noise, settings)
            return
        yield _attempt("evaluation", cfg, lambda: _evaluation(cfg), debug)
        steps = _attempt("model, on its data", cfg, lambda: _steps(cfg), debug)
        yield from _unless_said(steps, settings)
        if teacher_ap:
            yield _attempt("teacher", cfg, lambda: _teacher(cfg, teacher_ap), debug)


def check_without_data(cfg: CfgNode, debug: bool = False) -> Iterator[Part]:
    """What can be known of a config without its data and without its teacher's weights.

    Args:
        cfg: of a run.
        debug: let exceptions of libraries through.
    """
    settings = _attempt("config", cfg, lambda: _settings(cfg, 1), debug)
    yield settings
    with tempfile.TemporaryDirectory(prefix="d2kd_check_") as folder:
        cfg = _of_one_process(cfg, 1, folder)
        part = _attempt("model, on images of noise", cfg, lambda: _with_random_teacher(cfg), debug)
        lines = [_RANDOM if x.startswith(f"{WEIGHTS_FROM}{folder}") else x for x in part.lines]
        yield from _unless_said(part._replace(lines=lines), settings)


def _unless_said(part: Part, before: Part) -> Iterator[Part]:
    """A part, unless it ended at what an earlier one had found."""
    if not part.findings or part.findings != before.findings:
        yield part


def _attempt(name: str, cfg: CfgNode, action: Callable[[], List[str]], debug: bool) -> Part:
    """A part that ends at the first thing that is wrong, which is said in the config's words."""
    with _Log() as log:
        try:
            with errors_in_words_of(cfg):
                log.lines += action()
        except UserError as error:
            log.add("failed", ERROR, str(error))
        except Exception as error:  # whatever the libraries make of it
            if debug:
                raise
            log.add("failed", ERROR, f"{reason(error)} (--debug shows where)")
    return Part(name, log.lines, log.findings)


class _Log(logging.Handler):
    """Inside of it, what is logged is not shown but kept: the report on the pair, and warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: List[str] = []
        self.findings: List[Finding] = []

    def add(self, kind: str, severity: str, message: str) -> None:
        self.findings.append(Finding(kind, severity, "", message))

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.add("said while it was tried", WARNING, " ".join(record.getMessage().split()))
        elif record.name == _PAIR_REPORT:
            self.lines += record.getMessage().splitlines()

    def __enter__(self) -> "_Log":
        self._before = []
        for logger in map(logging.getLogger, LOGGERS):
            self._before.append((logger, logger.level, logger.propagate))
            logger.setLevel(logging.INFO)
            logger.propagate = False
            logger.addHandler(self)
        return self

    def __exit__(self, *raised: object) -> None:
        for logger, level, propagate in self._before:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate


def _settings(cfg: CfgNode, num_gpus: int) -> List[str]:
    refuse_settings(cfg)
    images_per_process(scale_to_processes(cfg, num_gpus).SOLVER.IMS_PER_BATCH, num_gpus)
    methods = ", ".join(distilled_methods(cfg)) or "none: a plain detector"
    return [f"student: {cfg.MODEL.META_ARCHITECTURE}; methods: {methods}"]


def _output(cfg: CfgNode) -> List[str]:
    refuse_occupied(cfg.OUTPUT_DIR)
    folder = os.path.abspath(cfg.OUTPUT_DIR)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"OUTPUT_DIR is '{cfg.OUTPUT_DIR}', but '{folder}' cannot be written")
    return [f"{cfg.OUTPUT_DIR} is free"]


def _data(cfg: CfgNode, images: bool, debug: bool) -> Iterator[Part]:
    names = _attempt("data sets", cfg, lambda: check_dataset_names(cfg) or [], debug)
    if names.findings:
        yield names
    for split in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[split]:
            if name in DatasetCatalog:
                yield _data_set(cfg, split, name, images)


def _data_set(cfg: CfgNode, split: str, name: str, images: bool) -> Part:
    evaluated = split == "TEST"
    with _Log() as log:
        content = inspect_dataset(name, evaluated, masks_needed(cfg, evaluated))
    bad = check_images(content.images, os.cpu_count() or 1, name) if images else []
    if not evaluated and count(bad, ERROR) <= cfg.RUN.SKIP_BAD_IMAGES:
        bad = [finding._replace(severity=WARNING) for finding in bad]
    opened = "all of its images looked at" if images else "images not opened"
    findings = [*content.findings, *log.findings, *bad]
    return Part(f"DATASETS.{split}: {name}", [f"{content}; {opened}"], findings)


def _of_one_process(cfg: CfgNode, num_gpus: int, folder: str) -> CfgNode:
    """The config of one of the processes of a run, which writes into another folder."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH //= num_gpus
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    cfg.OUTPUT_DIR = folder
    cfg.freeze()
    return cfg


def _evaluation(cfg: CfgNode) -> List[str]:
    refuse_no_evaluation(cfg)
    lines = []
    for name in cfg.DATASETS.TEST:
        ap, most = ap_of_annotations(cfg, name), _most_objects(name)
        if ap is None:
            lines.append(f"{name}: nothing to evaluate against")
        elif not ap >= _PERFECT and most > _COCO_DETECTIONS:
            logger.warning(
                f"{name}: an image has {most} objects, and COCO's AP counts "
                f"{_COCO_DETECTIONS} detections of an image: no detector can exceed {ap:.1f}"
            )
        elif not ap >= _PERFECT:
            raise UserError(
                f"{name}: taken as detections, its own annotations reach an AP of {ap:.1f}, not "
                "100: look for objects that are annotated twice or outside of their image"
            )
        else:
            lines.append(f"{name}: its annotations, taken as detections, reach an AP of {ap:.1f}")
    return lines


def _most_objects(name: str) -> int:
    """Of one image of a data set."""
    return max((len(d.get("annotations", ())) for d in DatasetCatalog.get(name)), default=0)


def _steps(cfg: CfgNode) -> List[str]:
    trial = try_steps(cfg)
    losses = ", ".join(f"{name} {value:.3g}" for name, value in trial.losses.items())
    seconds, steps = trial.seconds, cfg.SOLVER.MAX_ITER
    batch = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATION_STEPS
    evaluations = steps // cfg.TEST.EVAL_PERIOD if cfg.TEST.EVAL_PERIOD > 0 else 1
    images = sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TEST)
    return [
        f"the first step's losses: {losses}",
        f"time: {seconds:.2f} s a step with {batch} images on "
        f"{cfg.MODEL.DEVICE}, {trial.waiting:.2f} s of it waiting for data; "
        f"{_duration(seconds * steps)} for {steps} steps, and "
        f"{_duration(trial.image_seconds * images * evaluations)} for {evaluations} evaluations of "
        f"{images} images",
        f"memory: {_memory(trial.memory, cfg.MODEL.DEVICE)}",
    ]


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _memory(peak: float, device: str) -> str:
    text = f"{peak:.0f} MiB of tensors at the peak of a step; larger images take more"
    if not device.startswith("cuda"):
        return text
    total = torch.cuda.get_device_properties(device).total_memory / 2**20
    return f"{text}; {device} has {total:.0f} MiB"


def _teacher(cfg: CfgNode, wanted: TeacherAP) -> List[str]:
    if not distilled_methods(cfg):
        raise UserError("DISTILL.METHODS is empty: there is no teacher to evaluate")
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: there is nothing to evaluate the teacher on")
    name = cfg.DATASETS.TEST[0]
    ap = ap_of_teacher(cfg, name, wanted.images)
    found = f"the teacher's AP on {wanted.images or 'all'} images of {name} is {ap:.1f}"
    if not abs(ap - wanted.expected) <= wanted.tolerance:
        raise UserError(
            f"{found}, expected {wanted.expected:g} +- {wanted.tolerance:g}: are these its weights "
            "and its config (DISTILL.TEACHER.OPTS), and the classes in its order?"
        )
    return [f"{found}, as expected"]


def _on_noise(cfg: CfgNode) -> List[str]:
    model = build_for_training(cfg)
    try_on_noise(cfg, model)
    return ["losses are finite on images of noise; the data have errors"]


def _with_random_teacher(cfg: CfgNode) -> List[str]:
    cfg = cfg.clone()
    cfg.defrost()
    taught = bool(distilled_methods(cfg))
    if taught:
        cfg.DISTILL.TEACHER.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "teacher.pth")
        save_random_teacher(cfg, cfg.DISTILL.TEACHER.WEIGHTS)
    try_on_noise(cfg, build_for_training(cfg))
    teacher = ", with a teacher of random weights" if taught else ""
    return [f"losses are finite on images of noise{teacher}"]

"""A run's student beside its teacher and beside the student that learned alone."""

import math
import os
import tempfile
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from d2kd.distillation import build_teacher
from d2kd.engine import DistillTrainer
from d2kd.engine.metrics import newest_line, read_metrics
from d2kd.engine.preflight import refuse_no_evaluation
from d2kd.engine.trained_run import TrainedRun
from d2kd.errors import UserError
from d2kd.model_zoo import FINAL_WEIGHTS
from d2kd.pairing.pair import classes_of
from d2kd.prediction import Predictor, images_at_hand
from d2kd.views import any_family

from .measure import Latency, Size, device_name, latencies, size_of

_AP = "bbox/AP"
_TEACHER, _PLAIN = "teacher", "plain student"


class Row(NamedTuple):
    """One detector."""

    label: str
    size: Size
    latency: Latency
    ap: Optional[float]  # of boxes; None if nobody has evaluated it


class _Contender(NamedTuple):
    """A detector before it is measured."""

    label: str
    detector: nn.Module
    cfg: CfgNode
    ap: Optional[float]
    has_classes: bool = True  # those of the data


class Analysis(NamedTuple):
    """Detectors side by side."""

    rows: List[Row]
    gap_closed: Optional[float]
    not_evaluated: List[str]  # labels of detectors of other classes than the data's
    device: str
    repeats: int
    input_size: Tuple[int, int]  # (height, width) of the image that was timed, as detectors get it

    def table(self) -> str:
        """For people."""
        headers = [
            "",
            "parameters (M)",
            "weights (MB)",
            "GFLOPs",
            "median (ms)",
            "p90",
            "p99",
            "AP",
        ]
        lines = [
            [
                row.label,
                f"{row.size.parameters / 1e6:.2f}",
                f"{row.size.weights_bytes / 1e6:.1f}",
                f"{row.size.gflops:.2f}",
                *(f"{x:.1f}" for x in row.latency),
                "" if row.ap is None else f"{row.ap:.1f}",
            ]
            for row in self.rows
        ]
        height, width = self.input_size
        text = tabulate(lines, headers, disable_numparse=True, colalign=["left", *["right"] * 7])
        text += (
            f"\n\nLatency: one image of {height} x {width}, {self.repeats} passes, {self.device}. "
            "GFLOPs: multiply-adds."
        )
        for label in self.not_evaluated:
            text += f"\nThe {label} was not evaluated: its classes are not those of the data."
        if self.gap_closed is not None:
            text += (
                f"\nOf the gap between plain student and teacher, {self.gap_closed:.0%} is closed."
            )
        return text

    def as_dict(self) -> Dict[str, Any]:
        """For a JSON file."""
        rows = [
            {**row._asdict(), "size": row.size._asdict(), "latency": row.latency._asdict()}
            for row in self.rows
        ]
        return {**self._asdict(), "rows": rows, "torch": torch.__version__}


def analyze(
    run: TrainedRun,
    plain: Optional[TrainedRun] = None,
    evaluate: bool = False,
    repeats: int = 50,
    device: str = "",
) -> Analysis:
    """
    Args:
        run: whose student it is; its teacher stands beside it, if it has one.
        plain: the run of a student that learned alone.
        evaluate: AP that is not in a run's ``metrics.json`` is found by evaluating on the run's
            validation set.
        repeats: timed passes of each detector.
        device: see :meth:`~d2kd.engine.trained_run.TrainedRun.student`.

    Raises:
        UserError: if a detector or the data cannot be had.
    """
    cfg, student = run.config(), run.student(device)
    contenders = [_Contender(_label(cfg), student, cfg, last_ap(run))]
    if plain:
        contenders.insert(0, _plain(plain, cfg, device))
    if cfg.DISTILL.METHODS:
        contenders.insert(0, _teacher(cfg, student))
    if evaluate:
        if not cfg.DATASETS.TEST:
            raise UserError("--evaluate: DATASETS.TEST of the run is empty: it is not evaluated")
        refuse_no_evaluation(cfg)
        wanted = [x.ap is None and x.has_classes for x in contenders]
        aps = [evaluated_ap(x) if w else x.ap for x, w in zip(contenders, wanted)]
        contenders = [x._replace(ap=ap) for x, ap in zip(contenders, aps)]

    image = images_at_hand(cfg, 1)[0]
    inputs = [_inputs(x, image) for x in contenders]
    times = latencies([(x.detector, each) for x, each in zip(contenders, inputs)], repeats)
    rows = [
        Row(x.label, size_of(x.detector, each), time, x.ap)
        for x, each, time in zip(contenders, inputs, times)
    ]
    known = {row.label: row.ap for row in rows}
    closed = gap_closed(known.get(_TEACHER), known.get(_PLAIN), rows[-1].ap)
    size = tuple(inputs[-1]["image"].shape[-2:])
    others = [x.label for x in contenders if evaluate and not x.has_classes]
    return Analysis(rows, closed, others, device_name(_device(student)), repeats, size)


def _label(cfg: CfgNode) -> str:
    methods = ", ".join(cfg.DISTILL.METHODS)
    return f"student with {methods}" if methods else "student"


def _plain(run: TrainedRun, compared: CfgNode, device: str) -> _Contender:
    cfg = run.config()
    if cfg.DATASETS.TEST != compared.DATASETS.TEST:
        raise UserError(
            f"--plain was evaluated on {list(cfg.DATASETS.TEST)}, the run on "
            f"{list(compared.DATASETS.TEST)}: give a run with the same DATASETS.TEST"
        )
    return _Contender(_PLAIN, run.student(device), cfg, last_ap(run))


def _teacher(cfg: CfgNode, student: nn.Module) -> _Contender:
    """On the student's images, in its own channel order."""
    teacher = build_teacher(cfg, student)
    ours, theirs = classes_of(cfg, any_family(student), teacher.family, teacher.weights)
    cfg = cfg.clone()
    cfg.INPUT.FORMAT = teacher.input_format
    return _Contender(_TEACHER, teacher.detector, cfg, None, ours.same_as(theirs))


def _inputs(contender: _Contender, path: str) -> Dict[str, Any]:
    predictor = Predictor(contender.detector, contender.cfg)
    inputs = predictor.network_input(predictor.read(path))
    return {**inputs, "image": inputs["image"].to(_device(contender.detector))}


def _device(detector: nn.Module) -> torch.device:
    return next(detector.parameters()).device


def gap_closed(
    teacher: Optional[float], plain: Optional[float], distilled: Optional[float]
) -> Optional[float]:
    """The share of what a plain student lacks of its teacher that distillation made up for.

    Args:
        teacher, plain, distilled: AP.

    Returns:
        0: no better than the plain student, 1: as good as the teacher. None if an AP is unknown, or
        the teacher is no better than the plain student.
    """
    if teacher is None or plain is None or distilled is None or teacher <= plain:
        return None
    return (distilled - plain) / (teacher - plain)


def last_ap(run: TrainedRun) -> Optional[float]:
    """AP of boxes that a run wrote of its last checkpoint. None if there is none, or it is of
    another checkpoint."""
    if os.path.basename(run.weights) != FINAL_WEIGHTS:
        return None
    lines = read_metrics(run.folder, run.config().DATASETS.TEST)
    # The evaluation at the end is logged after the last step; a run may have been killed in it
    ap = newest_line(lines).get(_AP, math.nan)
    return ap if math.isfinite(ap) else None


def evaluated_ap(contender: _Contender) -> Optional[float]:
    """AP of boxes on the first validation set; leaves no file."""
    cfg = contender.cfg.clone()
    cfg.DATASETS.TEST = cfg.DATASETS.TEST[:1]
    print(f"Evaluating the {contender.label} on {cfg.DATASETS.TEST[0]} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        results = DistillTrainer.test(cfg, contender.detector)
    ap = results.get("bbox", {}).get("AP", math.nan)
    return ap if math.isfinite(ap) else None

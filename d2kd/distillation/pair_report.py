"""The table that compares teacher and student before training starts."""

from typing import Dict, Iterable, List, Mapping, Sequence, Tuple

from detectron2.config import CfgNode
from tabulate import tabulate

from d2kd.methods import Distiller
from d2kd.methods.core import TermSchedule, loss_name
from d2kd.views import Family, Read, Reads
from d2kd.views.families import BRANCHES

from .detectors import million_parameters
from .teacher import Teacher

PAIR_HEADERS = ("", "teacher", "student", "")
LOSS_HEADERS = ("loss", "weight", "reads of student", "reads of teacher", "verdict")
# How its line on the teacher's weights begins
WEIGHTS_FROM = "The teacher's weights: "


def pair_report(
    cfg: CfgNode,
    student: Family,
    teacher: Teacher,
    distillers: Mapping[str, Distiller],
    reads: Mapping[Tuple[str, str], Reads],
    schedules: Mapping[Tuple[str, str], TermSchedule],
    filled: Sequence[str],
) -> str:
    """
    Args:
        cfg: of the run.
        student: the student's family.
        teacher: the teacher.
        distillers: the methods that were built, by name.
        reads, schedules: of every (method, term).
        filled: what methods filled of the student before training.

    Returns:
        a table of what matters when one detector teaches another, and a line per loss.
    """
    rows = pair_rows(student, cfg.INPUT.FORMAT, teacher)
    pair = tabulate(rows, headers=PAIR_HEADERS, tablefmt="simple")
    verdicts = tabulate(loss_rows(distillers, reads, schedules), LOSS_HEADERS, tablefmt="simple")
    lines = [f"The student starts with {line}" for line in filled]
    for name, distiller in distillers.items():
        source = distiller.source_of_values(distiller.node_of(cfg), cfg.MODEL.META_ARCHITECTURE)
        lines += [f"Values of {name}: {source}"] if source else []
    lines += [f"{name}: {x.caveat}" for name, x in distillers.items() if x.caveat]
    if student.not_distilled:
        lines.append(f"Learn from ground truth alone: {', '.join(student.not_distilled)}")
    weights = WEIGHTS_FROM + (
        f"{teacher.weights}, {teacher.verdict}" if teacher.weights else "as initialised"
    )
    return "\n".join(["Teacher and student:", pair, weights, "", verdicts, *lines])


def pair_rows(student: Family, student_format: str, teacher: Teacher) -> List[List]:
    """The facts about a pair, under :data:`PAIR_HEADERS`.

    Args:
        student: the student's family.
        student_format: the channel order of its images.
        teacher: the teacher.
    """
    rows_s, rows_t = _facts(student, student_format), _facts(teacher.family, teacher.input_format)
    return [
        [name, rows_t[name], rows_s[name], "" if rows_t[name] == rows_s[name] else "differs"]
        for name in rows_s
    ]


def loss_rows(
    distillers: Mapping[str, Distiller],
    reads: Mapping[Tuple[str, str], Reads],
    schedules: Mapping[Tuple[str, str], TermSchedule],
) -> List[List]:
    """The losses, under :data:`LOSS_HEADERS`; arguments as in :func:`pair_report`."""
    return [
        [
            loss_name(name, term),
            schedules[name, term].weight,
            _words(reads[name, term].student),
            _words(reads[name, term].teacher),
            f"ok, {distiller.levels_of(term)} levels" if distiller.levels_of(term) else "ok",
        ]
        for name, distiller in distillers.items()
        for term in sorted(distiller.terms)
    ]


def _words(reads: Sequence[Read]) -> str:
    return ", ".join(map(str, reads))


def _facts(family: Family, input_format: str) -> Dict[str, object]:
    return {
        "architecture": family.name,
        "parameters": f"{million_parameters(family.detector):.2f} M",
        "classes": family.num_classes,
        "channel order": input_format,
        "pixel mean": _numbers(family.pixels.mean),
        "pixel std": _numbers(family.pixels.std),
        "padded to multiples of": family.pixels.size_divisibility,
        "levels": _numbers(level.name for level in family.levels),
        "strides": _numbers(level.stride for level in family.levels),
        "channels": _numbers(level.channels for level in family.levels),
        **_head_facts(family),
    }


def _head_facts(family: Family) -> Dict[str, object]:
    head = family.dense_head
    if head is None:
        names = ("dense head", "tower blocks", "anchors per location", "box coding")
        return dict.fromkeys(names, "none")
    return {
        "dense head": type(head.module).__name__,
        "tower blocks": _numbers(f"{b} {head.num_blocks(b)}" for b in BRANCHES),
        "anchors per location": head.num_anchors,
        "box coding": head.box_coding,
    }


def _numbers(values: Iterable) -> str:
    return " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in values)

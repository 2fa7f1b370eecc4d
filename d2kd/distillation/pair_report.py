"""The table that compares teacher and student before training starts."""

from typing import Dict, Iterable, List, Mapping, Sequence, Tuple

from tabulate import tabulate

from d2kd.methods import Distiller
from d2kd.methods.core import loss_name
from d2kd.views import Family, Read, Reads
from d2kd.views.families import BRANCHES

from .detectors import million_parameters
from .teacher import Teacher

PAIR_HEADERS = ("", "teacher", "student", "")
LOSS_HEADERS = ("loss", "weight", "reads of student", "reads of teacher", "verdict")
# How its line on the teacher's weights begins
WEIGHTS_FROM = "The teacher's weights: "


def pair_report(
    student: Family,
    student_format: str,
    teacher: Teacher,
    distillers: Dict[str, Distiller],
    reads: Dict[Tuple[str, str], Reads],
    weights: Dict[Tuple[str, str], float],
    filled: Sequence[str],
    sources: Dict[str, str],
) -> str:
    """
    Args:
        student: the student's family.
        student_format: the channel order of its images.
        teacher: the teacher.
        distillers: the methods that were built, by name.
        reads, weights: of every (method, term).
        filled: what methods filled of the student before training.
        sources: where the values of each method's keys come from; "" if they do not differ by kind
            of student.

    Returns:
        a table of what matters when one detector teaches another, and a line per loss.
    """
    rows = pair_rows(student, student_format, teacher)
    pair = tabulate(rows, headers=PAIR_HEADERS, tablefmt="simple")
    verdicts = tabulate(loss_rows(distillers, reads, weights), LOSS_HEADERS, tablefmt="simple")
    starts = "".join(f"\nThe student starts with {line}" for line in filled)
    starts += "".join(f"\nValues of {name}: {s}" for name, s in sources.items() if s)
    starts += "".join(f"\n{name}: {x.caveat}" for name, x in distillers.items() if x.caveat)
    apart = student.not_distilled
    if apart:
        starts += f"\nLearn from ground truth alone: {', '.join(apart)}"
    source = f"{WEIGHTS_FROM}{teacher.weights or 'as initialised'}"
    return f"Teacher and student:\n{pair}\n{source}\n\n{verdicts}{starts}"


def pair_rows(student: Family, student_format: str, teacher: Teacher) -> List[List]:
    """The facts about a pair, under :data:`PAIR_HEADERS`; arguments as in :func:`pair_report`."""
    rows_s, rows_t = _facts(student, student_format), _facts(teacher.family, teacher.input_format)
    return [
        [name, rows_t[name], rows_s[name], "" if rows_t[name] == rows_s[name] else "differs"]
        for name in rows_s
    ]


def loss_rows(
    distillers: Mapping[str, Distiller],
    reads: Mapping[Tuple[str, str], Reads],
    weights: Mapping[Tuple[str, str], float],
) -> List[List]:
    """The losses, under :data:`LOSS_HEADERS`; arguments as in :func:`pair_report`."""
    return [
        [
            loss_name(name, term),
            weights[name, term],
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

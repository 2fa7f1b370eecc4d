"""The table that compares teacher and student before training starts."""

from typing import Dict

from detectron2.config import CfgNode
from tabulate import tabulate

from d2kd.methods import Distiller

from .families import Family
from .families.dense_head import BRANCHES
from .teacher import Teacher


def pair_report(
    cfg: CfgNode, student: Family, teacher: Teacher, distillers: Dict[str, Distiller]
) -> str:
    """
    Args:
        cfg: the student's config.
        student: the student's family adapter.
        teacher: the teacher.
        distillers: the methods that were built, by name.

    Returns:
        a table of what matters when one detector teaches another, and a line per loss.
    """
    rows_s = _facts(student, cfg.INPUT.FORMAT)
    rows_t = _facts(teacher.family, teacher.input_format)
    rows = [
        [name, rows_t[name], rows_s[name], "" if rows_t[name] == rows_s[name] else "differs"]
        for name in rows_s
    ]
    pair = tabulate(rows, headers=["", "teacher", "student", ""], tablefmt="simple")
    losses = [
        [
            f"loss_{name}_{term}".lower(),
            distiller.node(cfg)[term.upper()].WEIGHT,
            ", ".join(distiller.requires[term].student),
            ", ".join(distiller.requires[term].teacher),
            f"ok, {distiller.levels_of(term)} levels" if distiller.levels_of(term) else "ok",
        ]
        for name, distiller in distillers.items()
        for term in sorted(distiller.terms)
    ]
    headers = ["loss", "weight", "reads of student", "reads of teacher", "verdict"]
    verdicts = tabulate(losses, headers, tablefmt="simple")
    return f"Teacher and student:\n{pair}\n\n{verdicts}"


def _facts(family: Family, input_format: str) -> dict:
    detector, head = family.detector, family.dense_head
    parameters = sum(p.numel() for p in detector.parameters())
    return {
        "architecture": family.name,
        "parameters": f"{parameters / 1e6:.2f} M",
        "classes": family.num_classes,
        "channel order": input_format,
        "pixel mean": _numbers(detector.pixel_mean),
        "pixel std": _numbers(detector.pixel_std),
        "padded to multiples of": detector.backbone.size_divisibility,
        "levels": " ".join(level.name for level in family.levels),
        "strides": " ".join(str(level.stride) for level in family.levels),
        "channels": " ".join(str(level.channels) for level in family.levels),
        "dense head": type(head.module).__name__,
        "tower blocks": " ".join(f"{b} {head.num_blocks(b)}" for b in BRANCHES),
        "anchors per location": head.num_anchors,
        "box coding": head.box_coding,
    }


def _numbers(tensor) -> str:
    return " ".join(f"{x:g}" for x in tensor.flatten().tolist())

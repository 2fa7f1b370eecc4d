"""What methods read, and between which detectors they work: asked of detectors without
numbers."""

import functools
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from detectron2.config import CfgNode

from d2kd.config import read_config
from d2kd.distillation import declared_reads, student_on_meta
from d2kd.errors import UserError
from d2kd.views import Family, Read, build_family

# One of each kind; by the name of its architecture in tables
_DETECTORS = {
    "RetinaNet": "baselines/retinanet_R_50_FPN_1x.yaml",
    "FCOS": "baselines/fcos_R_50_FPN_1x.yaml",
    "PaperFCOS": "baselines/paper_fcos_R_50_FPN_1x.yaml",
    "ATSS": "baselines/atss_R_50_FPN_1x.yaml",
    "GFL": "baselines/gfl_R_50_FPN_1x.yaml",
    "two-stage": "baselines/faster_rcnn_R_50_FPN_1x.yaml",
}


class _Detector(NamedTuple):
    cfg: CfgNode
    family: Family


@functools.cache
def _detector(kind: str) -> _Detector:
    cfg = read_config(_DETECTORS[kind])
    return _Detector(cfg, build_family(student_on_meta(cfg)))


TermReads = Dict[str, Tuple[Tuple[Read, ...], Tuple[Read, ...]]]


def reads_of(method: str) -> Tuple[str, str, TermReads]:
    """What a method reads with its default values, of the first pair that it works between.

    Returns:
        kind of the student; of the teacher; per term, the reads of both.
    """
    for student, teacher in _all_pairs():
        reads = _declared(student, teacher, method)
        if reads is not None:
            return student, teacher, reads
    return "", "", {}


def teachers_of(method: str) -> Dict[str, List[str]]:
    """The kinds of teachers that a method works with, by kind of student."""
    found: Dict[str, List[str]] = {kind: [] for kind in _DETECTORS}
    for student, teacher in _all_pairs():
        if _declared(student, teacher, method) is not None:
            found[student].append(teacher)
    return found


def _all_pairs() -> Iterator[Tuple[str, str]]:
    """Pairs of one kind come first."""
    pairs = [(student, teacher) for student in _DETECTORS for teacher in _DETECTORS]
    return iter(sorted(pairs, key=lambda pair: pair[0] != pair[1]))


def _declared(student: str, teacher: str, method: str) -> Optional[TermReads]:
    """Per term, what a method reads of two kinds of detectors; None if it does not work there."""
    cfg = _detector(student).cfg.clone()
    cfg.DISTILL.METHODS = [method]
    try:
        reads = declared_reads(cfg, _detector(student).family, _detector(teacher).family)
    except UserError:
        return None
    return {term: (r.student, r.teacher) for (_, term), r in reads.items()}


def kinds() -> List[str]:
    """The kinds of detectors that are asked."""
    return list(_DETECTORS)

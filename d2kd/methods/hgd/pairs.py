"""The correspondence of HGD: which stages of two networks belong together."""

import math
from typing import Dict, List, NamedTuple, Sequence, Tuple

from torch import Tensor
from torch.nn import functional as F

from d2kd.errors import UserError
from d2kd.views import Family, Level


class StagePair(NamedTuple):
    """One stage of the student and what it imitates.

    Attributes:
        part: what both are, "stages" of the backbone or "features", FPN levels.
        student: the student's stage.
        teachers: the teacher's, mostly one. The first is the partner, others are to be mixed in.
    """

    part: str
    student: Level
    teachers: Tuple[Level, ...]


def trained_stage_pairs(
    student: Family,
    teacher: Family,
    parts: Sequence[str],
    names: Sequence[str],
    pairing: str,
    key: str,
    unpaired: str = "drop",
) -> Tuple[List[StagePair], List[str]]:
    """Pairs those stages of a student that are trained with the teacher's.

    Args:
        student, teacher: the two families.
        parts: "stages" (of the backbone), "features" (FPN levels) or both.
        names: the student's stages or levels to take; empty = all.
        pairing: how to pair:
            "stride": equal stride, the deeper stage where there are several. Backbone stages
            without a partner take the one of nearest stride, the deeper of two (FPN levels are
            left out). Backbones of equally many stages that have no stride in common, or repeat
            one because they are dilated, are paired by order.
            "order": from the coarsest.
            "learned": every stage with all of the teacher's.
        key: config node to blame, with the keys ``STAGES``, ``PAIRING`` and ``UNPAIRED``.
        unpaired: what happens to the teacher's stages that have no partner: "drop", or "average",
            which adds each to the pair of nearest stride, the deeper of two.

    Returns:
        the pairs, finest first, and the names of those that are left out because they are frozen.

    Raises:
        UserError: if a name does not exist or has no partner, nothing corresponds, all are frozen,
            or stages of the teacher that are to be mixed differ in width.
    """
    known = [level.name for part in parts for level in _levels(student, part)]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"{key}.STAGES names {', '.join(unknown)}: the student ({student.name}) has "
            f"{', '.join(known)}"
        )
    pairs = [
        pair
        for part in parts
        for pair in _pairs(part, student, teacher, pairing, unpaired)
        if not names or pair.student.name in names
    ]
    alone = [name for name in names if name not in [pair.student.name for pair in pairs]]
    if alone or not pairs:
        missing = f"no partner of {', '.join(alone)}" if alone else "no stage in common"
        raise UserError(
            f"{key}.STAGES: {missing}; {_strides(parts, student, teacher)}: take other stages, or "
            f"set {key}.PAIRING to 'order'"
        )
    choice = "PAIRING is 'learned'" if pairing == "learned" else f"UNPAIRED is '{unpaired}'"
    _check_widths(pairs, f"{key}.{choice}")
    trained = [pair for pair in pairs if student.is_trained(pair.student.name)]
    if not trained:
        raise UserError(
            f"{key}.STAGES: {', '.join(p.student.name for p in pairs)} of the student are all "
            "frozen: lower MODEL.BACKBONE.FREEZE_AT, or take other stages"
        )
    return trained, [pair.student.name for pair in pairs if pair not in trained]


def _levels(family: Family, part: str) -> List[Level]:
    levels = family.stages if part == "stages" else family.levels
    return sorted(levels, key=lambda level: level.stride)


def _pairs(
    part: str, student: Family, teacher: Family, pairing: str, unpaired: str
) -> List[StagePair]:
    ours, theirs = _levels(student, part), _levels(teacher, part)
    if pairing == "learned" and theirs:
        return [StagePair(part, level, tuple(theirs)) for level in ours]
    pairs = _partners(part, ours, theirs, pairing)
    return _with_unpaired(pairs, theirs) if unpaired == "average" else pairs


def _partners(part: str, ours: List[Level], theirs: List[Level], pairing: str) -> List[StagePair]:
    if pairing == "order" or (part == "stages" and _only_order_tells(ours, theirs)):
        both = list(zip(reversed(ours), reversed(theirs)))[::-1]
        return [StagePair(part, a, (b,)) for a, b in both]
    by_stride: Dict[int, Level] = {level.stride: level for level in theirs}
    if not any(level.stride in by_stride for level in ours):
        return []
    if part == "features":
        ours = [level for level in ours if level.stride in by_stride]
    return [StagePair(part, level, (_nearest(level, theirs),)) for level in ours]


def _with_unpaired(pairs: List[StagePair], theirs: List[Level]) -> List[StagePair]:
    paired = {level for pair in pairs for level in pair.teachers}
    extra: Dict[Level, List[Level]] = {pair.student: [] for pair in pairs}
    for level in theirs:
        if pairs and level not in paired:
            extra[_nearest(level, list(extra))].append(level)
    return [pair._replace(teachers=(*pair.teachers, *extra[pair.student])) for pair in pairs]


def _only_order_tells(ours: List[Level], theirs: List[Level]) -> bool:
    strides = [{level.stride for level in levels} for levels in (ours, theirs)]
    repeated = any(len(found) < len(ours) for found in strides)
    return len(ours) == len(theirs) and (repeated or strides[0].isdisjoint(strides[1]))


def _nearest(level: Level, candidates: List[Level]) -> Level:
    return min(reversed(candidates), key=lambda other: abs(math.log2(other.stride / level.stride)))


def _strides(parts: Sequence[str], student: Family, teacher: Family) -> str:
    found = {
        side: [level.stride for part in parts for level in _levels(family, part)]
        for side, family in (("student", student), ("teacher", teacher))
    }
    return f"strides of the student {found['student']}, of the teacher {found['teacher']}"


def _check_widths(pairs: List[StagePair], choice: str) -> None:
    for pair in pairs:
        widths = [level.channels for level in pair.teachers]
        if len(set(widths)) > 1:
            raise UserError(
                f"{choice}, which mixes stages of one width, but what {pair.student.name} of the "
                f"student learns from has {widths} channels: choose another, or SOURCE 'neck'"
            )


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(N, C, ...) -> (N, C, *size): averages a map that is nowhere smaller, interpolates others."""
    if x.shape[-2] >= size[0] and x.shape[-1] >= size[1]:
        return x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size, mode="bilinear", align_corners=False)

"""Which FPN levels and backbone stages of two detectors have equal stride."""

from typing import List, Sequence, Tuple

from d2kd.errors import UserError, nearest

from .families import Family, Level

LevelPair = Tuple[Level, Level]  # of the student, of the teacher


def paired_levels(student: Family, teacher: Family, key: str) -> List[LevelPair]:
    """Pairs the FPN levels of equal stride, finest first. Levels without a partner are left out.

    Args:
        student, teacher: the two families.
        key: config key to blame when nothing matches.

    Raises:
        UserError: if no stride is common.
    """
    by_stride = {level.stride: level for level in teacher.levels}
    pairs = [
        (level, by_stride[level.stride]) for level in student.levels if level.stride in by_stride
    ]
    if not pairs:
        raise UserError(
            f"{key}: no FPN level in common; strides of the student "
            f"{[level.stride for level in student.levels]}, of the teacher "
            f"{[level.stride for level in teacher.levels]}"
        )
    return pairs


def channels_of(pairs: Sequence[LevelPair]) -> List[Tuple[int, int]]:
    """(student, teacher) channels of pairs of levels."""
    return [(ours.channels, theirs.channels) for ours, theirs in pairs]


def paired_stages(
    student: Family, teacher: Family, names: Sequence[str], key: str
) -> List[LevelPair]:
    """Pairs backbone stages of the student with those of the teacher that have the same stride.

    Args:
        student, teacher: the two families.
        names: the student's stages.
        key: config key that holds the names, for messages.

    Raises:
        UserError: if the student has no such stage, or the teacher none of its stride, or several
            of which none has its name.
    """
    ours = {stage.name: stage for stage in student.stages}
    pairs: List[LevelPair] = []
    for name in names:
        if name not in ours:
            raise UserError(f"{key} names '{name}': {nearest(name, ours)}")
        stride = ours[name].stride
        theirs = {stage.name: stage for stage in teacher.stages if stage.stride == stride}
        shared = [stage for stage in student.stages if stage.stride == stride]
        if not theirs:
            known = sorted({stage.stride for stage in teacher.stages})
            raise UserError(
                f"{key} names '{name}' of stride {stride}, but the teacher's stages have strides "
                f"{known}: leave it out"
            )
        if len(theirs) == len(shared) == 1:
            pairs.append((ours[name], *theirs.values()))
        elif name in theirs:  # dilated backbones have two stages of one stride
            pairs.append((ours[name], theirs[name]))
        else:
            raise UserError(
                f"{key} names '{name}' of stride {stride}, of which the teacher has "
                f"{', '.join(theirs)}: which of them is meant cannot be told, leave it out"
            )
    return pairs

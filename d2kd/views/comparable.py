"""What has to be the same of two heads whose predictions are compared one by one."""

from typing import Any, Callable, Sequence, Tuple

from d2kd.errors import UserError

from .families import Family
from .pairs import LevelPair

Fact = Tuple[str, str, Callable[[Family], Any]]  # config key, what it is, its value

LEVELS: Fact = (
    "IN_FEATURES of its head",
    "strides of the levels",
    lambda f: [level.stride for level in f.levels],
)
CLASSES: Fact = ("NUM_CLASSES of its head", "number of classes", lambda f: f.num_classes)
HEAD_CLASSES: Fact = (
    "NUM_CLASSES of its head",
    "number of classes per anchor",
    lambda f: f.dense_head.num_classes,
)
ANCHORS: Fact = (
    "MODEL.ANCHOR_GENERATOR",
    "anchors per location",
    lambda f: f.dense_head.num_anchors,
)
ANCHOR_SHAPES: Fact = ("MODEL.ANCHOR_GENERATOR", "shapes of the anchors", lambda f: f.anchor_shapes)
BOX_FORM: Fact = ("MODEL.META_ARCHITECTURE", "form of box predictions", lambda f: f.box_form)
BINS: Fact = (
    "MODEL.GFL.REG_MAX",
    "highest bin per box side",
    lambda f: f.dense_head.box_dim // 4 - 1,
)


def check_same(student: Family, teacher: Family, facts: Sequence[Fact], key: str) -> None:
    """
    Args:
        student, teacher: the two families.
        facts: what has to be the same.
        key: config node of the method that compares predictions.

    Raises:
        UserError: naming the first fact in which they differ.
    """
    for config_key, what, of in facts:
        ours, theirs = of(student), of(teacher)
        if ours != theirs:
            raise UserError(
                f"{key} compares predictions one by one: the {what} is {ours} of the student "
                f"({config_key}) and {theirs} of the teacher (DISTILL.TEACHER.CONFIG); take a "
                "teacher that has the same"
            )


def check_same_anchors(
    student: Family, teacher: Family, levels: Sequence[LevelPair], key: str
) -> None:
    """
    Args:
        student, teacher: two families with dense heads.
        levels: those that are compared.
        key: config key that compares predictions of anchors.

    Raises:
        UserError: if the anchors of two levels have other shapes.
    """
    for ours, theirs in levels:
        a, b = student.anchor_shapes[ours.index], teacher.anchor_shapes[theirs.index]
        if a != b:
            raise UserError(
                f"{key} compares predictions of anchors one by one: at {ours.name} the student's "
                f"(MODEL.ANCHOR_GENERATOR) are {a}, the teacher's {b}; take a teacher that has the "
                "same, or set it to 0"
            )

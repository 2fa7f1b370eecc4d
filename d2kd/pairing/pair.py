"""A student and a teacher by their names: a recipe, a file, a config in Detectron2's model zoo, or
what training left."""

import os
from typing import List, NamedTuple, Optional, Sequence, Tuple

from detectron2.config import CfgNode

from d2kd.checkpoint import class_names_in
from d2kd.config import read_config
from d2kd.data.classes import class_names_of, plain_name
from d2kd.distillation import student_on_meta, teacher_on_meta
from d2kd.engine.trained_run import detectron2_run, open_run
from d2kd.errors import UserError, first_of
from d2kd.lazy import is_python
from d2kd.model_zoo import config_name, find_config, resolve_config
from d2kd.views import Family, build_family

_MAX_NAMED = 3  # classes in a message


class Classes(NamedTuple):
    """What a detector tells apart."""

    count: Optional[int]  # None if its family does not say
    names: Tuple[str, ...]  # in order; may be unknown

    def same_as(self, other: "Classes") -> bool:
        """Whether two detectors have the same classes, as far as they are known."""
        if None not in (self.count, other.count) and self.count != other.count:
            return False
        return not (self.names and other.names) or self._plain() == other._plain()

    def _plain(self) -> List[str]:
        return [plain_name(name) for name in self.names]

    def __str__(self) -> str:
        count = "unknown" if self.count is None else self.count
        named = f" ({first_of(self.names, _MAX_NAMED)})" if self.names else ""
        return f"{count} classes{named}"


class Pair(NamedTuple):
    """A student and a teacher before weights are read."""

    base: str  # the student's config, as a YAML names it
    teacher: str  # the teacher's
    weights: str  # the teacher's; may be ""
    cfg: CfgNode  # of the student, with DISTILL.TEACHER
    student_family: Family  # on the meta device, without numbers
    teacher_family: Family
    student_classes: Classes
    teacher_classes: Classes

    @property
    def same_classes(self) -> bool:
        """Whether predictions of the two are about the same classes."""
        return self.student_classes.same_as(self.teacher_classes)

    @property
    def kind(self) -> str:
        """What the two have in common: "two-stage", "dense" for one-stage detectors of one
        architecture, or "" if they are of two kinds."""
        ours, theirs = self.student_family, self.teacher_family
        if ours.box_head is not None and theirs.box_head is not None:
            return "two-stage"
        return "dense" if ours.box_form and ours.name == theirs.name else ""


def open_pair(student: str, teacher: str, opts: Sequence[str] = ()) -> Pair:
    """
    Args:
        student: a recipe, a file, or a name in Detectron2's model zoo.
        teacher: likewise; or the folder of a run, or one of its checkpoints.
        opts: changes to the student's config, KEY VALUE ...

    Raises:
        UserError: if one of them is not there, cannot be built, or cannot be distilled.
    """
    base = _config_of(student, "--student")
    if is_python(base):
        raise UserError(
            f"--student is '{student}', a Python config: it says itself what teaches it, in "
            "'distill'; train it with --config-file"
        )
    if len(opts) % 2:
        read_config(base, opts)  # says so in the user's words
    if "DISTILL.TEACHER.CONFIG" in opts[::2]:
        raise UserError("DISTILL.TEACHER.CONFIG does not go with --teacher: name that config there")
    config, weights = _teacher_of(teacher)
    named = {"CONFIG": config, "WEIGHTS": weights, "OPTS": [], "PRECISION": ""}
    words = [word for k, v in named.items() for word in (f"DISTILL.TEACHER.{k}", v)]
    cfg = read_config(base, ["DISTILL.METHODS", [], *words, *opts])
    source = teacher_on_meta(cfg)
    weights = weights or cfg.DISTILL.TEACHER.WEIGHTS or source.weights
    ours, theirs = build_family(student_on_meta(cfg)), build_family(source.detector)
    return Pair(base, config, weights, cfg, ours, theirs, *classes_of(cfg, ours, theirs, weights))


def classes_of(
    cfg: CfgNode, student: Family, teacher: Family, weights: str
) -> Tuple[Classes, Classes]:
    """What a student, and what its teacher tells apart.

    Args:
        cfg: of the student, with ``DISTILL.TEACHER.CONFIG``.
        student, teacher: the two families.
        weights: the teacher's; may be "".
    """
    in_data = class_names_of(cfg.DATASETS.TRAIN)
    learned = len(in_data) or None  # by a student that does not say
    return (
        Classes(learned if student.num_classes is None else student.num_classes, in_data),
        Classes(teacher.num_classes, _teacher_names(cfg, teacher, weights)),
    )


def _config_of(name: str, key: str) -> str:
    """A config as another one names it: the name of a recipe, or an absolute path."""
    path = resolve_config(name, key)
    named = config_name(path)
    return named if path == find_config(named) else os.path.abspath(path)


def _teacher_of(name: str) -> Tuple[str, str]:
    """Config and weights of a teacher; weights are "" where they follow from the config."""
    if os.path.isdir(name) or name.endswith(".pth"):
        of_detectron2 = detectron2_run(name)
        if of_detectron2:
            return of_detectron2
        run = open_run(name)
        return run.student_file, run.weights
    return _config_of(name, "--teacher"), ""


def _teacher_names(cfg: CfgNode, teacher: Family, weights: str) -> Tuple[str, ...]:
    """The teacher's classes: those in its file, else those of the data that its config names, if
    they are as many as it has."""
    if os.path.isfile(weights) and (names := class_names_in(weights)):
        return names
    node = cfg.DISTILL.TEACHER
    if is_python(node.CONFIG):
        return ()
    names = class_names_of(read_config(node.CONFIG, node.OPTS).DATASETS.TRAIN)
    return names if len(names) == teacher.num_classes else ()

"""Which method suits a student and a teacher: an order of preference, and why it is that one."""

from typing import Dict, List, NamedTuple, Optional, Sequence

from detectron2.config import CfgNode

from d2kd.config import check_config
from d2kd.distillation import declared_reads, keys_on_classes
from d2kd.errors import UserError, nearest
from d2kd.methods import DISTILLER_REGISTRY

from .pair import Pair


class Preference(NamedTuple):
    """A method, and the pairs that it comes first for.

    Attributes:
        kind: what both detectors are, "two-stage" or "dense"; "" for any two.
        published: only for students that its authors give values for.
        reason: in a few words, for people.
    """

    method: str
    kind: str
    published: bool
    reason: str


# The first one that fits is taken. Why in this order: docs/quick-start.md.
PREFERENCES = (
    Preference(
        "DeFeat",
        "two-stage",
        False,
        "two two-stage detectors: level with FRS in United-Perception's table (41.0 and 40.9 AP, "
        "stages distilled too), and it costs little beside the teacher's forward",
    ),
    Preference(
        "FRS",
        "dense",
        True,
        "heads of one kind and the same classes: published results within 0.2 AP of "
        "CrossKD's, next to no cost beside the teacher's forward",
    ),
    Preference(
        "CrossKD",
        "dense",
        False,
        "heads of one kind and the same classes: the highest published results for this student",
    ),
    Preference(
        "PKD",
        "",
        False,
        "it compares features alone, whatever their scale, so heads and classes may differ",
    ),
    Preference("HGD", "", False, "there are backbone stages to compare, but no common FPN levels"),
)


class Choice(NamedTuple):
    """The methods of a recipe.

    Attributes:
        methods: names.
        reason: why these.
        others: what else fits the pair, by name.
    """

    methods: List[str]
    reason: str
    others: List[str]


def choose(pair: Pair, methods: Sequence[str] = ()) -> Choice:
    """
    Args:
        pair: the two detectors.
        methods: names that the user wants; the first that suits the pair by default.

    Raises:
        UserError: if these, or all, methods cannot work between the two.
    """
    if methods:
        _check_asked(pair, methods)
        return Choice(list(methods), "as asked", [])
    refused: Dict[str, str] = {}
    for preference in PREFERENCES:
        name = preference.method
        if not _is_candidate(preference, pair):
            continue
        problem = problem_of(pair.cfg, [name], pair)
        if problem is None:
            others = [x for x in methods_that_fit(pair) if x != name]
            return Choice([name], preference.reason, others)
        refused[name] = problem
    problem = next(reversed(refused.values()), "none is made for these two")
    raise UserError(f"no method fits '{pair.base}' and '{pair.teacher}': {problem}")


def methods_that_fit(pair: Pair) -> List[str]:
    """The names of all methods that can work between two detectors, with their default values."""
    names = sorted(name for name, _ in DISTILLER_REGISTRY)
    return [name for name in names if problem_of(pair.cfg, [name], pair) is None]


def problem_of(cfg: CfgNode, methods: Sequence[str], pair: Pair) -> Optional[str]:
    """Why some methods cannot work between two detectors; None if they can."""
    cfg = cfg.clone()
    cfg.DISTILL.METHODS = list(methods)
    try:
        check_config(cfg)
        reads = declared_reads(cfg, pair.student_family, pair.teacher_family)
    except UserError as error:
        return str(error)
    keys = keys_on_classes(reads)
    if keys and not pair.same_classes:
        return (
            f"the student has {pair.student_classes}, the teacher {pair.teacher_classes}: they "
            f"have to be the same for {', '.join(keys)}"
        )
    return None


def _is_candidate(preference: Preference, pair: Pair) -> bool:
    method, architecture = preference.method, pair.cfg.MODEL.META_ARCHITECTURE
    return preference.kind in ("", pair.kind) and (
        not preference.published
        or DISTILLER_REGISTRY.get(method).defaults_for(architecture) is not None
    )


def _check_asked(pair: Pair, methods: Sequence[str]) -> None:
    known = [name for name, _ in DISTILLER_REGISTRY]
    for name in methods:
        if name not in known:
            raise UserError(f"--method is '{name}': {nearest(name, known)}")
    problem = problem_of(pair.cfg, methods, pair)
    if problem is not None:
        remedy = "" if pair.same_classes else "; or add --finetune-teacher"
        raise UserError(problem + remedy)

"""Lists of methods, recipes and teachers."""

import os
from typing import Callable, Dict, List, Optional, Sequence

from tabulate import tabulate

from d2kd.errors import UserError, nearest
from d2kd.model_zoo import shipped_weights, trained_weights, zoo_teachers

from .configs import Config, configs, recipes
from .known_numbers import metric_of, published, row
from .methods import methods

_WIDEST = 70  # characters in a cell
# Where configs of detectors that may teach stand
_TEACHERS = ("baselines", "mmdet", "shapes/baselines")


def listing(kind: str, method: str = "", words: Sequence[str] = ()) -> str:
    """
    Args:
        kind: one of :data:`KINDS`.
        method: of recipes and their teachers, only those of this one.
        words: only lines that have all of these, in whatever case.

    Returns:
        a table.

    Raises:
        UserError: if there is no such method, or nothing is left.
    """
    known = [known.name for known in methods()]
    if method and method not in known:
        raise UserError(f"--method is '{method}': {nearest(method, known)}")
    rows = KINDS[kind](method)
    if not rows:
        raise UserError(
            f"--method is '{method}', for which d2kd has no {kind}: write one, as "
            "docs/adding-a-method.md shows, or leave --method out"
        )
    kept = [r for r in rows if all(w.lower() in " ".join(r).lower() for w in words)]
    if not kept:
        raise UserError(f"none of {len(rows)} {kind} has {' '.join(words)}: give fewer words")
    widths = [_WIDEST] * len(_HEADERS[kind])
    return tabulate(kept, _HEADERS[kind], "simple", disable_numparse=True, maxcolwidths=widths)


def _methods(method: str) -> List[List[str]]:
    named = [x for x in methods() if method in ("", x.name)]
    return [[x.name, x.summary, str(len(x.recipes))] for x in named]


def _recipes(method: str) -> List[List[str]]:
    return [
        [
            config.name,
            ", ".join(config.methods),
            config.teacher.replace(".yaml", ""),
            _with_metric(row(config.name).get("ap"), config.name),
        ]
        for config in recipes()
        if not method or method in config.methods
    ]


def _teachers(method: str) -> List[List[str]]:
    """What can teach: detectors that are published, those to train first, and Detectron2's."""
    ours = [x for x in configs().values() if os.path.dirname(x.name) in _TEACHERS]
    taught_by = {x.teacher for x in recipes() if method in x.methods}
    rows = [
        [x.name, _with_metric(published(x.file), x.name), _weights(x)]
        for x in ours
        if not x.methods
    ]
    zoo = [[x, _with_metric(published(f"{x}.yaml"), x), "Detectron2's"] for x in zoo_teachers()]
    return [r for r in (*rows, *zoo) if not method or f"{r[0]}.yaml" in taught_by]


def _with_metric(number: Optional[float], config: str) -> str:
    metric = metric_of(config)
    return f"{number or ''}{f' ({metric})' if number and metric != 'AP' else ''}"


def _weights(config: Config) -> str:
    if trained_weights(config.path):
        return trained_weights(config.path)
    if shipped_weights(config.path):
        return shipped_weights(config.path)
    return "MMDetection's" if config.name.startswith("mmdet/") else "to be trained"


_HEADERS: Dict[str, Sequence[str]] = {
    "methods": ("method", "the student learns", "recipes"),
    "recipes": ("recipe", "methods", "teacher", "AP reported"),
    "teachers": ("teacher", "AP published", "weights"),
}
KINDS: Dict[str, Callable[[str], List[List[str]]]] = {
    "methods": _methods,
    "recipes": _recipes,
    "teachers": _teachers,
}

"""A method in words: what its code says of itself."""

import re
import sys
import textwrap
from typing import List, NamedTuple

from d2kd.benchmark.costs import Costs, ratio
from d2kd.methods import DISTILLER_REGISTRY, Distiller

from .configs import Config, recipes
from .keys import keys_of, what_it_may_be
from .known_numbers import measured_costs, row
from .pairs import kinds, reads_of, teachers_of

_INDENT = " " * 6


class Method(NamedTuple):
    """A registered method."""

    name: str
    cls: type

    @property
    def summary(self) -> str:
        """What the student learns, one sentence."""
        text = " ".join((self.cls.__doc__ or "").split())
        return re.split(r"(?<=\.)\s", text)[0]

    @property
    def paper(self) -> str:
        """Title, authors and address."""
        text = " ".join((sys.modules[self.cls.__module__].__doc__ or "").split())
        cited = re.match(r"(.*?https?://[^\s)]+\)?)", text)
        return cited[1] if cited else text.split(". ")[0]

    @property
    def recipes(self) -> List[Config]:
        return [config for config in recipes() if self.name in config.methods]


def methods() -> List[Method]:
    """All registered methods, by name."""
    return [Method(name, cls) for name, cls in sorted(DISTILLER_REGISTRY)]


def explain_method(method: Method) -> str:
    """What it is, reads, costs, its keys and its recipes."""
    parts = [
        f"{method.name}: {method.summary}\n{method.paper}",
        _reads(method),
        _detectors(method),
        _keys(method.cls),
        _costs(method),
        _recipes(method),
    ]
    return "\n\n".join(part for part in parts if part)


def _reads(method: Method) -> str:
    student, teacher, terms = reads_of(method.name)
    if not terms:
        return ""
    lines = [f"Reads, for instance between {student} and {teacher}"]
    for term, (ours, theirs) in terms.items():
        sides = [", ".join(map(str, reads)) or "nothing" for reads in (ours, theirs)]
        lines.append(f"  {term}: of the student {sides[0]}; of the teacher {sides[1]}")
    return "\n".join(lines)


def _detectors(method: Method) -> str:
    lines = ["Works with its default values, by kind of student, with teachers"]
    for student, teachers in teachers_of(method.name).items():
        named = "of any kind" if len(teachers) == len(kinds()) else ", ".join(teachers)
        lines.append(f"  {student:10} {named or 'none'}")
    return "\n".join(lines)


def _keys(cls: "type[Distiller]") -> str:
    lines = [f"Keys, below {cls.node_name()}"]
    for name, key in keys_of(cls):
        lines.append(f"  {name} = {key.default!r} ({what_it_may_be(key)})")
        lines += textwrap.wrap(key.help, 96, initial_indent=_INDENT, subsequent_indent=_INDENT)
    for student, defaults in cls.defaults_of.items():
        values = ", ".join(f"{key} {value}" for key, value in defaults.values.items())
        lines.append(f"  {student} students: {values or 'as above'} ({defaults.source})")
    others = "LEVEL_WEIGHTS, WARMUP_ITERS, DECAY, START_ITER, STOP_ITER"
    lines.append(f"  of every term: {others}; d2kd explain {cls.node_name()}.<TERM>.DECAY ...")
    return "\n".join(lines)


def _costs(method: Method) -> str:
    lines = [_cost(costs) for costs in measured_costs() if costs.methods == (method.name,)]
    return "\n".join(["Cost of a step (docs/speed.md)", *lines]) if lines else ""


def _cost(costs: Costs) -> str:
    label = f", {costs.case.label}" if costs.case.label else ""
    return (
        f"  {costs.case.recipe}{label}: time {ratio(costs, 'c', 'a'):.2f} times a plain step, "
        f"{ratio(costs, 'c', 'ab'):.2f} times that and the teacher's forward; memory "
        f"{costs.memory['c'] / costs.memory['a']:.2f} times; on {costs.device}"
    )


def _recipes(method: Method) -> str:
    lines = [f"  {recipe.name}{_reported(recipe)}" for recipe in method.recipes]
    title = "Recipes, with the AP that is reported of them; d2kd explain <recipe> says more"
    return "\n".join([title, *lines]) if lines else ""


def _reported(recipe: Config) -> str:
    ap = row(recipe.name).get("ap")
    return f": {ap}" if ap else ""

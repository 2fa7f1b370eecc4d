#!/usr/bin/env python
"""Writes docs/configuration.md: every config key that d2kd adds to Detectron2's, from the code.

python tools/configuration_page.py
python tools/configuration_page.py --check

With ``--check`` nothing is written; the exit status tells whether the page is up to date.
"""

from typing import Any, Dict, Iterator, List, Sequence, Tuple, Type

from generated import ROOT, write_or_check

from d2kd.catalogue.keys import keys_of
from d2kd.config import DATASETS_KEYS, DISTILL_KEYS, RUN_KEYS, SOLVER_KEYS
from d2kd.methods import DISTILLER_REGISTRY, Distiller
from d2kd.methods.core import term
from d2kd.modeling.config import FPN_KEYS, NODES
from d2kd.schema import Key, Keys, walk

PAGE = ROOT / "docs/configuration.md"
HEAD = ("key", "default", "may be", "meaning")

INTRODUCTION = """\
# Configuration

<!-- Written by tools/configuration_page.py from the code: change it there. -->

Every config key that d2kd adds to
[Detectron2's](https://detectron2.readthedocs.io/en/latest/modules/config.html), with its default,
and what it may be. `MODEL` describes the student, exactly as in Detectron2; `DISTILL` what teaches
it. A key that does not exist, or a value of the wrong type or out of its range, is refused when the
config is read, with its name.

A key stands in a YAML, or at the end of a command:

```sh
d2kd train --config-file shapes/frs/fcos_tiny.yaml DISTILL.FRS.FEATURE.WEIGHT 0.02
```
"""

TERMS = """\
## Every term

Each loss term of a method, `DISTILL.<METHOD>.<TERM>`, has these keys. A term of weight 0 is neither
built nor computed. What a `WEIGHT` defaults to, and any other default that is not the one here,
stands with the method below.
"""

SOURCES = """\
Where values come from: *note* is a reading note of the paper, *[R]* a re-implementation, *ours* is
published nowhere: [more](methods/{page}.md#where-it-comes-from).
"""

MODEL = """\
## The student

Detectors and backbones that Detectron2 lacks in YAML. `MODEL.META_ARCHITECTURE` names `FCOS`,
`PaperFCOS` (it reads `MODEL.FCOS`), `ATSS` or `GFL`; `MODEL.BACKBONE.NAME` one of the backbones in
[any teacher](any-teacher.md#timm) or in `d2kd/modeling/backbone`.
"""

SOLVER = """\
## The solver

Beside these keys, `SOLVER.CLIP_GRADIENTS.CLIP_TYPE` may be `full_model`: the norm of all gradients
together is clipped, as MMDetection does.
"""


def code(value: Any) -> str:
    """A value as it stands in a YAML."""
    text = str(list(value)) if isinstance(value, (list, tuple)) else repr(value)
    return f"`{text}`".replace("'", '"')


def allowed(key: Key) -> str:
    """What a key's values may be, beside their type."""
    if key.choices:
        return ", ".join(code(choice) for choice in key.choices)
    parts = [key.bounds()] if key.bounds() else []
    if key.length is not None:
        lengths = (key.length,) if isinstance(key.length, int) else key.length
        parts.append(f"{' or '.join(map(str, lengths))} values")
    return ", ".join(parts)


def row(name: str, key: Key, default: str = "") -> Tuple[str, ...]:
    cells = (f"`{name}`", default or code(key.default), allowed(key), key.help)
    return tuple(cell.replace("|", "\\|") for cell in cells)


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = HEAD) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(title: str, keys: Keys, prefix: str) -> str:
    return f"{title}\n\n" + table([row(name, key) for name, key in walk(keys, prefix)])


def term_section() -> str:
    keys = dict(walk(term(0.0, "Weight of the term in the sum of the losses"), "<TERM>"))
    weight, *others = (row(name, key) for name, key in keys.items())
    name, _, *rest = weight
    return f"{TERMS}\n" + table([(name, "by term", *rest), *others])


def method_rows(method: Type[Distiller]) -> Iterator[Tuple[str, ...]]:
    """A method's keys."""
    by_kind = keys_by_kind(method)
    for name, key in keys_of(method):
        yield row(name, key, "by kind of student" if name in by_kind else "")


def keys_by_kind(method: Type[Distiller]) -> List[str]:
    """The keys whose defaults differ by kind of student."""
    keys = dict.fromkeys(key for kind in method.defaults_of.values() for key in kind.values)
    return list(keys)


def kinds(method: Type[Distiller]) -> str:
    """The defaults by kind of student."""
    keys, every = keys_by_kind(method), dict(walk(method.keys, method.node_name()))
    usual = {key: every[f"{method.node_name()}.{key}"].default for key in keys}
    rows = [
        [f"`{kind}`", *map(code, {**usual, **values}.values()), source]
        for kind, (values, source) in method.defaults_of.items()
    ]
    rows.append(["any other", *map(code, usual.values()), "nobody's: search your own"])
    head = ["`MODEL.META_ARCHITECTURE`", *(f"`{key}`" for key in keys), "source"]
    return f"Defaults by kind of student:\n\n{table(rows, head)}"


def method_section(name: str, method: Type[Distiller]) -> str:
    page = method.__module__.split(".")[2]
    parts = [f"### {method.node_name()}", f"[{name}](methods/{page}.md)."]
    keys = table(list(method_rows(method)))
    parts += [SOURCES.format(page=page).strip(), keys] if "[R]" in keys else [keys]
    if method.defaults_of:
        parts.append(kinds(method))
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    methods: Dict[str, Type[Distiller]] = dict(DISTILLER_REGISTRY)
    sections = [
        INTRODUCTION.strip(),
        section("## The teacher and the methods", DISTILL_KEYS, "DISTILL"),
        term_section(),
        "## Methods",
        *(method_section(name, methods[name]) for name in sorted(methods)),
        section(MODEL.strip(), {**NODES, "FPN": FPN_KEYS}, "MODEL"),
        section("## The run", RUN_KEYS, "RUN"),
        section(SOLVER.strip(), SOLVER_KEYS, "SOLVER"),
        section("## Data", DATASETS_KEYS, "DATASETS"),
    ]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    write_or_check(PAGE, page)

"""One method, recipe or config key, explained."""

import os
import shlex
import textwrap
from typing import Iterator, List

import yaml
from detectron2.config import CfgNode

from d2kd.command import typed_command
from d2kd.config import default_config
from d2kd.errors import UserError, nearest
from d2kd.schema import get_value

from .configs import Config, bases, configs, tables
from .keys import all_keys, defaults_by_student, what_it_may_be
from .known_numbers import metric_of, published, row
from .methods import explain_method, methods

_WIDTH = 96


def explain(name: str) -> str:
    """
    Args:
        name: of a method, a recipe or another shipped config, a table of ablations, or a config
            key.

    Raises:
        UserError: if it is none of these.
    """
    by_name = {method.name.lower(): method for method in methods()}
    if name.lower() in by_name:
        return explain_method(by_name[name.lower()])
    stem = os.path.splitext(name)[0] if name.endswith((".yaml", ".yml")) else name
    stem = stem[len("configs/") :] if stem.startswith("configs/") else stem
    if stem in configs():
        return _explain_config(configs()[stem])
    if stem in tables():
        return _explain_table(tables()[stem])
    key = _explain_key(name.upper())
    if key:
        return key
    known = [*(method.name for method in by_name.values()), *configs(), *tables(), *all_keys()]
    raise UserError(f"'{name}' is no method, recipe, table or config key: {nearest(name, known)}")


def _explain_config(config: Config) -> str:
    _, *below = bases(config)
    lines = [config.name, *_wrapped(config.about), ""]
    lines += [f"based on {', '.join(dict.fromkeys(base.name for base in below))}"] if below else []
    if config.methods:
        lines += [f"methods {', '.join(config.methods)}", f"teacher {_with_ap(config.teacher)}"]
    lines += list(_reported(config))
    own = {key: value for key, value in config.own.items() if key != "_BASE_"}
    lines += ["", yaml.safe_dump(own, sort_keys=False).strip(), ""] if own else [""]
    command = shlex.join([*typed_command(), "train", "--config-file", config.file])
    return "\n".join([*lines, command])


def _explain_table(table: Config) -> str:
    lines = [table.name, *_wrapped(table.about), "", "rows"]
    lines += [f"  {label}" for label in table.own["ROWS"]]
    command = shlex.join([*typed_command(), "compare", table.file])
    return "\n".join([*lines, "", command])


def _with_ap(config: str) -> str:
    ap = published(config)
    return f"{config}, {ap} {metric_of(config)} published" if ap else config


def _reported(config: Config) -> Iterator[str]:
    entry = row(config.name)
    if entry.get("row"):
        yield f"row {entry['row']}"
    if entry.get("ap"):
        yield f"reported {entry['ap']} {metric_of(config.name)}, source: {entry['source']}"
    if entry.get("doubt"):
        yield f"not certain: {entry['doubt']}"


def _explain_key(name: str) -> str:
    """A config key in words: its default, what it may be and what it means; "" if there is none of
    that name."""
    cfg = default_config()
    try:
        value = get_value(cfg, name)
    except (KeyError, TypeError):
        return ""
    if isinstance(value, CfgNode):
        return "\n".join([f"{name}: a node", *(f"  {name}.{key}" for key in value)])
    key = all_keys().get(name)
    if key is None:
        return f"{name}: a key of Detectron2's\n  default {value!r}"
    lines = [name, *_wrapped(key.help), f"default {key.default!r}", f"it is {what_it_may_be(key)}"]
    for student, (default, source) in defaults_by_student(name).items():
        lines.append(f"default for {student} students {default!r} ({source})")
    return "\n  ".join(lines)


def _wrapped(text: str) -> List[str]:
    return textwrap.wrap(text, _WIDTH)

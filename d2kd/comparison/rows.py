"""The rows of a comparison: recipes, and files of ablations that stand for several rows."""

import json
import os
import re
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Sequence

import yaml

from d2kd.config import read_config
from d2kd.errors import UserError, nearest
from d2kd.lazy import python_overrides
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.model_zoo import recipe_name, resolve_config
from d2kd.safe_yaml import plain_yaml
from d2kd.schema import leaves

TABLE_KEYS = ("BASE", "PLAIN", "ROWS")
# What a comparison gives to each run, in the names of YAML and of Python configs
_GIVEN = {
    "SEED": "--seeds",
    "train.seed": "--seeds",
    "OUTPUT_DIR": "--output",
    "train.output_dir": "--output",
}


class Row(NamedTuple):
    """What one row of a table is trained with."""

    label: str
    config: str  # absolute path
    opts: List[str]  # what the row changes in it, KEY VALUE ...


def row_of(config_file: str) -> Row:
    """The row of one config, by the name of a recipe or a path."""
    path = os.path.abspath(resolve_config(config_file, "config"))
    return Row(recipe_name(path), path, [])


def folder_of(row: Row) -> str:
    """Folder of a row's runs in the output, without the seed."""
    slug = re.sub(r"[^\w.+-]+", "-", row.label).strip("-")
    return os.path.join(recipe_name(row.config), slug) if row.opts else recipe_name(row.config)


def read_rows(config_file: str) -> List[Row]:
    """The rows that a file on the command line stands for: those of a table, or the one recipe."""
    path = resolve_config(config_file, "config")
    with open(path, errors="replace") as f:
        is_table = re.search(r"^(BASE|ROWS)\s*:", f.read(), flags=re.MULTILINE)
    return read_table(path) if is_table else [row_of(config_file)]


def read_table(path: str) -> List[Row]:
    """Reads a file of ablations: one recipe, and what each row changes in it.

    Its keys are ``BASE``, the recipe; ``ROWS``, which maps the label of a row to the config keys
    that it changes, in full or nested as in a config, ``{}`` for the recipe itself; and,
    optionally, ``PLAIN``, the config of the student alone. A row may have a ``BASE`` of its own; if
    all have, the file needs none. Paths are relative to the file.

    Args:
        path: of the file.

    Returns:
        the rows in their order, the plain student first.

    Raises:
        UserError: if the file is broken, or has an unknown key, or lacks one.
    """
    content = _read_mapping(path)
    rows = []
    if "PLAIN" in content:
        rows.append(Row("plain student", _beside(path, content, "PLAIN"), []))
    base = _beside(path, content, "BASE") if content.get("BASE") else ""
    for label, changes in content["ROWS"].items():
        if not isinstance(changes, dict):
            raise UserError(
                f"{path}: row '{label}' is {changes!r}: give a mapping from config keys to values, "
                "{} for the recipe itself"
            )
        if not isinstance(label, str):  # 1.0 and true would be one row
            raise UserError(f"{path}: row {label!r} has no text for a label: put it in quotes")
        own = _beside(path, changes, "BASE") if "BASE" in changes else base
        if not own:
            raise UserError(
                f"{path}: BASE is missing: name the recipe that the rows change, or that of row "
                f"'{label}'"
            )
        changes = {key: value for key, value in changes.items() if key != "BASE"}
        opts = [word for key, value in leaves(changes) for word in (key, _word(value))]
        rows.append(Row(label, own, opts))
    return rows


def _read_mapping(path: str) -> Dict[str, Any]:
    """The content of a file of ablations, all of its keys checked."""
    with open(path, "rb") as f:
        try:
            content = plain_yaml(f.read())
        except (yaml.YAMLError, RecursionError) as e:
            raise UserError(f"{path}: {' '.join(str(e).split())}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {content!r:.40}, expected {', '.join(TABLE_KEYS)}")
    for key in content:
        if key not in TABLE_KEYS:
            raise UserError(f"{path}: no key {key}: {nearest(str(key), TABLE_KEYS)}")
    if not isinstance(content.get("ROWS"), dict) or not content["ROWS"]:
        raise UserError(f"{path}: ROWS is missing or no mapping: give 'label: {{KEY: value}}'")
    return content


def _beside(path: str, content: Dict[str, Any], key: str) -> str:
    """Path of a config that a file of ablations names, relative to it or as a recipe."""
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), str(content[key]))
    name = beside if os.path.isfile(beside) else str(content[key])
    return os.path.abspath(resolve_config(name, f"{path}: {key}"))


def _word(value: Any) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def check_rows(rows: Sequence[Row], opts: Sequence[str] = ()) -> None:
    """Reads all configs before the first is trained.

    Args:
        rows: of a comparison.
        opts: overrides of all of them, KEY VALUE ...

    Raises:
        UserError: if one is broken, or sets what the comparison sets or what no method reads, or
            different rows have one folder.
    """
    _refuse_given(opts, "command line")
    seen: Dict[str, Row] = {}
    for row in rows:
        folder = folder_of(row)
        if seen.setdefault(folder, row)[1:] != row[1:]:
            raise UserError(f"two rows would go to one folder, {folder}: give them other labels")
        _refuse_given(row.opts, f"row '{row.label}'")
        own = read_config(row.config, python_overrides(row.config, row.opts), f"row '{row.label}'")
        _refuse_unused(row, own.DISTILL.METHODS)
        cfg = read_config(row.config, python_overrides(row.config, [*row.opts, *opts]))
        if not cfg.DATASETS.TEST:
            raise UserError(f"row '{row.label}': DATASETS.TEST is empty, there is no AP to compare")


def _refuse_given(opts: Sequence[str], where: str) -> None:
    for word in opts:
        key = str(word).partition("=")[0]
        if key in _GIVEN:
            raise UserError(f"{where}: {key} is given to each run by {_GIVEN[key]}: leave it out")


def _refuse_unused(row: Row, methods: Sequence[str]) -> None:
    """A row is not to be called after keys that change nothing in it."""
    nodes = {name.upper() for name, _ in DISTILLER_REGISTRY} - set(map(str.upper, methods))
    for key in row.opts:
        node = re.match(r"DISTILL\.(\w+)\.", key)
        if node and node[1] in nodes:
            raise UserError(
                f"row '{row.label}': {key} has no effect, DISTILL.METHODS is {list(methods)}: name "
                "its method there as well, or leave it out"
            )


def labels_of(rows: Sequence[Row]) -> List[str]:
    """What rows are called in a table: their labels, or folders where files share a label."""
    count = Counter(row.label for row in rows)
    return [row.label if count[row.label] == 1 else folder_of(row) for row in rows]

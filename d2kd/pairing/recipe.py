"""The YAML that a student, a teacher and methods amount to."""

import ast
import contextlib
import os
import shlex
from typing import Any, Dict, List, Mapping, Sequence

import yaml
from detectron2.config import CfgNode

from d2kd.checkpoint import STUDENT_PROGRAM, STUDENT_YAML, checkpoint_names
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.safe_yaml import plain_yaml, read_value
from d2kd.schema import get_value, plain_values, set_value
from d2kd.writing import atomic_write

from .pair import Pair

_STUDENTS = (STUDENT_YAML, STUDENT_PROGRAM)  # in a run's folder
RECIPE_YAML = "recipe.yaml"  # in the run's folder


def recipe_of(pair: Pair, methods: Sequence[str], opts: Sequence[str], output: str) -> Dict:
    """
    Args:
        pair: the two detectors.
        methods: names.
        opts: the user's changes, KEY VALUE ...
        output: the run's folder.

    Returns:
        the content of the YAML. It has the methods' weights, although they are the defaults.
    """
    teacher = {"CONFIG": pair.teacher, "WEIGHTS": pair.weights, "OPTS": []}
    content: Dict[str, Any] = {
        "_BASE_": pair.base,
        "DISTILL": {"METHODS": list(methods), "TEACHER": teacher},
    }
    for name in methods:
        content["DISTILL"][name.upper()] = _values(pair.cfg, name)
    merge(content, nested(opts))
    if "DATASETS" in content:  # relative paths are those of the current folder
        merge(content, {"DATASETS": described_datasets(pair.cfg)})
    content["OUTPUT_DIR"] = output
    return content


def _values(cfg: CfgNode, name: str) -> Dict[str, Any]:
    """The weights of a method's terms, and what else its authors chose for this student."""
    method = DISTILLER_REGISTRY.get(name)
    node = method.node_of(cfg)
    keys = [f"{term.upper()}.WEIGHT" for term in method.enabled_terms(node)]
    defaults = method.defaults_for(cfg.MODEL.META_ARCHITECTURE)
    keys += [key for key in (defaults.values if defaults else ()) if key not in keys]
    plain = plain_values(node)
    values: Dict[str, Any] = {}
    for key in keys:
        set_value(values, key, get_value(plain, key))
    return values


def described_datasets(cfg: CfgNode) -> Dict[str, List]:
    """``TRAIN`` and ``TEST`` of a config, data of one's own by their files again."""
    entries = {entry["name"]: entry for entry in cfg.DATASETS.DESCRIBED}
    found = ("name", "classes")  # what reading the files added
    files = {n: {k: v for k, v in x.items() if k not in found} for n, x in entries.items()}
    return {
        split: [files.get(name, name) for name in cfg.DATASETS[split]]
        for split in ("TRAIN", "TEST")
    }


def nested(opts: Sequence[Any]) -> Dict[str, Any]:
    """KEY VALUE ... as a YAML has them, values read as Detectron2 reads those of a command."""
    content: Dict[str, Any] = {}
    for key, value in zip(opts[::2], opts[1::2]):
        set_value(content, str(key), _plain(value))
    return content


def _plain(value: Any) -> Any:
    value = read_value(value)
    if not isinstance(value, str):
        return value
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value
    return _lists(value)


def _lists(value: Any) -> Any:
    """Lists for tuples, as YAML has them."""
    return [_lists(x) for x in value] if isinstance(value, (list, tuple)) else value


def merge(content: Dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Puts changes into nested content, in place."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(content.get(key), dict):
            merge(content[key], value)
        else:
            content[key] = value


def write_recipe(
    folder: str, content: Mapping[str, Any], comments: Sequence[str], replace: bool = False
) -> str:
    """Writes ``recipe.yaml``, whole, unless the folder has it already. Another one is replaced as
    long as the run has saved nothing: its command may have been a mistake.

    Args:
        folder: of the run.
        content: of the YAML.
        comments: lines at its top.
        replace: also the one by which a run was trained, which is told to go on by this one.

    Returns:
        its path.

    Raises:
        UserError: if the folder has another one, by which a run was trained.
    """
    path = os.path.join(folder, RECIPE_YAML)
    if os.path.isfile(path) and checkpoint_names(folder) and not replace:
        _refuse_other(path, content)
        return path
    os.makedirs(folder, exist_ok=True)
    with atomic_write(path) as f:
        f.writelines(f"# {line}\n" for line in comments)
        f.write(yaml.safe_dump(dict(content), sort_keys=False, width=100))
    return path


def _refuse_other(path: str, content: Mapping[str, Any]) -> None:
    with open(path, "rb") as f, contextlib.suppress(yaml.YAMLError, RecursionError):
        if plain_yaml(f.read()) == content:
            return
    raise UserError(
        f"{path} is of another run, with other detectors, methods or settings: give another "
        f"OUTPUT_DIR, or go on with that run, by --resume --config-file {shlex.quote(path)}, or "
        "with these changes, by --force-resume"
    )


def output_of(pair: Pair, methods: Sequence[str], opts: Sequence[str]) -> str:
    """Where a run goes unless ``OUTPUT_DIR`` is among its changes: a folder named after all."""
    names = (pair.base, pair.teacher)
    given = [value for key, value in zip(opts[::2], opts[1::2]) if key == "OUTPUT_DIR"]
    # A run's student is called as its folder
    named = (os.path.dirname(x) if os.path.basename(x) in _STUDENTS else x for x in names)
    stems = [os.path.splitext(os.path.basename(x))[0] for x in named]
    return given[-1] if given else os.path.join("output", "_".join([*stems, *methods]))

"""The config of a run, kept in its folder: what a resumed run is compared with."""

import logging
import os
import re
from typing import Any, Container, Dict, List, Mapping, Set, Tuple

from detectron2.config import CfgNode
from detectron2.utils import comm

from d2kd.checkpoint import SavedRun
from d2kd.config import DISTILL_KEYS, default_config
from d2kd.errors import UserError, first_of
from d2kd.lazy import comparable, is_lazy, is_python, lazy_config, load_program, to_program
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.safe_yaml import read_yaml
from d2kd.schema import leaves, plain_values
from d2kd.writing import atomic_write

logger = logging.getLogger(__name__)

CONFIG_YAML = "config.yaml"
CONFIG_PROGRAM = "config.py"  # of a run whose config is a Python program
# What may change in the middle of a run: where it is saved and logged, and how it is evaluated
_FREE = (
    "OUTPUT_DIR",
    "RUN",
    "VERSION",
    "VIS_PERIOD",
    "SOLVER.CHECKPOINT_PERIOD",
    "DATASETS.TEST",
    "DATASETS.DESCRIBED",  # where files are; the names of the sets tell what they hold
    "TEST",
    # In a Python config
    "dataloader.described",
    "dataloader.evaluator",
    "dataloader.test",
    "run",
    "train.checkpointer",
    "train.eval_period",
    "train.log_period",
    "train.output_dir",
)
# Of these, what changes the numbers of an evaluation
_FREE_IF_TRAINED = ("DATASETS.TEST", "TEST", "dataloader.evaluator", "dataloader.test")
_NOT_FREE = ("TEST.PRECISE_BN",)  # changes the statistics of the student
# Thresholds of the student's inference, as Detectron2 names them: MODEL.X_TEST, model.test_x
_FREE_NAME = re.compile(r"(?!DISTILL).*_TEST|model\.(.*\.)?test_\w+")
MAX_NAMED = 6  # settings in a message
_MISSING = object()


def config_file(cfg: CfgNode) -> Tuple[str, str]:
    """What the config of a run is kept as: the name of the file, and what it holds."""
    kept = _without_unused_methods(cfg)
    if is_lazy(cfg):
        return CONFIG_PROGRAM, to_program(lazy_config(kept), "# The config of this run")
    return CONFIG_YAML, kept.dump()


def _without_unused_methods(cfg: CfgNode) -> CfgNode:
    """A run can be opened where a method that it does not use is not registered, or has changed."""
    kept = cfg.clone()
    kept.defrost()
    for name, method in DISTILLER_REGISTRY:
        if name not in cfg.DISTILL.METHODS:
            del kept.DISTILL[method.__name__.upper()]
    return kept


def write_run_config(cfg: CfgNode) -> None:
    """Writes ``config.yaml`` or ``config.py`` into the run's folder, on the main process."""
    if comm.is_main_process():
        name, text = config_file(cfg)
        with atomic_write(os.path.join(cfg.OUTPUT_DIR, name)) as f:
            f.write(text)


def config_of_run(folder: str) -> str:
    """The path of a run's config, ``config.yaml`` or ``config.py``."""
    return yaml_or_program(folder, CONFIG_YAML, CONFIG_PROGRAM)


def yaml_or_program(folder: str, yaml: str, program: str) -> str:
    """The path of one of two files. A program is read only where there is no YAML: a folder's files
    may come from anybody."""
    path, program = os.path.join(folder, yaml), os.path.join(folder, program)
    return program if os.path.isfile(program) and not os.path.isfile(path) else path


def refuse_short(cfg: CfgNode, saved: SavedRun) -> None:
    """
    Raises:
        UserError: if the run has done more steps than it is to have.
    """
    if saved.steps > cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}, but the run in '{cfg.OUTPUT_DIR}' has done "
            f"{saved.steps} steps already ({saved.path}): give a number above, or another "
            "OUTPUT_DIR"
        )


def refuse_changed(cfg: CfgNode, saved: SavedRun, processes: int) -> None:
    """
    Args:
        cfg: of the command.
        saved: what it would go on from.
        processes: that it would have.

    Raises:
        UserError: if something differs that changes what the run comes to.
    """
    path = config_of_run(cfg.OUTPUT_DIR)
    if not os.path.isfile(path):
        logger.warning(f"{path} is missing: the settings of the run cannot be compared with it")
    changed = changed_settings(cfg)
    if saved.processes not in (0, processes):
        changed.append(f"the number of processes was {saved.processes}, is {processes}")
    if changed:
        raise UserError(
            f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' holds a run with other settings: "
            f"{first_of(changed, MAX_NAMED)}; give those of the run, or another "
            "OUTPUT_DIR, or --force-resume to go on with the new ones"
        )


def changed_settings(cfg: CfgNode, evaluation: bool = False) -> List[str]:
    """:func:`differences` between the config that lies in ``OUTPUT_DIR``, if one does, and this."""
    path = config_of_run(cfg.OUTPUT_DIR)
    if not os.path.isfile(path):
        return []
    if is_python(path) != is_lazy(cfg):
        return [f"its config is {path}"]
    read = _read_program if is_python(path) else read_yaml
    return differences(read(path), cfg, evaluation)


def differences(saved: Mapping[str, Any], cfg: CfgNode, evaluation: bool = False) -> List[str]:
    """
    Args:
        saved: what the config of a run holds.
        cfg: the config that it is compared with.
        evaluation: whether keys count as well that change how the student is evaluated.

    Returns:
        a few words per key that changes the result of a run and has another value. A key that the
        saved one lacks counts with its default, one of a method that they do not share not at all.
    """
    before = {**dict(leaves(_defaults(cfg))), **dict(leaves(saved))}
    now = dict(leaves(_plain(cfg)))
    shared = _methods(before) & _methods(now)
    return [
        f"{key} {_words(before.get(key, _MISSING), 'was')}, {_words(now.get(key, _MISSING), 'is')}"
        for key in sorted({*before, *now})
        if _counts(key, evaluation)
        and not _is_of_other_methods(key, shared)
        and repr(before.get(key, _MISSING)) != repr(now.get(key, _MISSING))
    ]


def _methods(values: Mapping[str, Any]) -> Set[str]:
    """The nodes of the methods that a run trains with, by all values of its config."""
    names = values.get("DISTILL.METHODS", values.get("distill.METHODS"))
    return {str(name).upper() for name in names} if isinstance(names, list) else set()


def _is_of_other_methods(key: str, nodes: Container[str]) -> bool:
    node = re.match(r"(?:DISTILL|distill)\.(\w+)\.", key)
    return node is not None and node[1] not in DISTILL_KEYS and node[1] not in nodes


def _read_program(path: str) -> Dict[str, Any]:
    return comparable(load_program(path))


def _defaults(cfg: CfgNode) -> Dict[str, Any]:
    """Those that a config has of itself; a Python config has d2kd's alone."""
    plain = plain_values(default_config())
    return {"distill": plain["DISTILL"]} if is_lazy(cfg) else plain


def _words(value: Any, verb: str) -> str:
    return f"{verb} missing" if value is _MISSING else f"{verb} {value!r:.60}"


def _counts(key: str, evaluation: bool) -> bool:
    if key.startswith(_NOT_FREE):
        return True
    free = [name for name in _FREE if not (evaluation and name in _FREE_IF_TRAINED)]
    within = any(key == name or key.startswith(name + ".") for name in free)
    return not within and (evaluation or not _FREE_NAME.fullmatch(key))


def _plain(cfg: CfgNode) -> Dict[str, Any]:
    """As it comes back from a file: lists for tuples."""
    return comparable(lazy_config(cfg)) if is_lazy(cfg) else plain_values(cfg)

"""Reading a Python config, and changing it on the command line."""

import ast
from typing import Any, List, Sequence

from detectron2.config import LazyConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from d2kd.errors import UserError, nearest, reason

from .places import NODES, PLACES, in_lazy_words

_NEEDED = ("model", "optimizer", "lr_multiplier", "dataloader.train", "train.max_iter")


def is_python(path: str) -> bool:
    """Whether a config file is a program."""
    return path.endswith(".py")


def load_program(path: str, opts: Sequence[str] = (), opts_key: str = "command line") -> DictConfig:
    """Runs a Python config, and changes what it defines.

    Args:
        path: the file.
        opts: ``path.key=value``, in Hydra's syntax.
        opts_key: where ``opts`` come from, for messages.

    Raises:
        UserError: if the program fails, or a change is none, or is of a key that does not exist.
    """
    try:
        config = LazyConfig.load(path)
    except Exception as error:  # whatever a program can raise
        raise UserError(f"{path}: {reason(error)}") from error
    for word in map(str, opts):
        _refuse_unknown(config, word, opts_key)
        try:
            LazyConfig.apply_overrides(config, [word])
        except Exception as error:  # of Hydra or OmegaConf
            raise UserError(f"{opts_key}: '{word}': {reason(error)}") from error
    return config


def _refuse_unknown(config: DictConfig, word: str, opts_key: str) -> None:
    key, equals, _ = word.partition("=")
    if not equals:
        place = in_lazy_words(key)
        raise UserError(
            f"{opts_key}: '{word}' does not change a Python config: give path.key=value, such as "
            f"{'train.max_iter' if place == key else place}=..."
        )
    parts, node = key.split("."), config
    if key.startswith(("+", "~")) or key in PLACES.values() or parts[0] in NODES.values():
        return
    for i, part in enumerate(parts):
        # The arguments of a call are checked by the call
        if isinstance(node, ListConfig) or "_target_" in node:
            return
        if part not in node:
            prefix = "".join(f"{p}." for p in parts[:i])
            known = {*(f"{prefix}{name}" for name in node), *PLACES.values()}
            raise UserError(f"{opts_key}: no config key {key}: {nearest(key, known)}")
        node = OmegaConf.select(node, part)
        if not OmegaConf.is_config(node):
            return


def refuse_incomplete(config: DictConfig, path: str) -> None:
    """
    Raises:
        UserError: if a config does not define what a run needs.
    """
    for place in _NEEDED:
        if OmegaConf.select(config, place, default=None) is None:
            raise UserError(
                f"{path}: defines no '{place}': a config to train needs "
                f"{', '.join(_NEEDED)}, as Detectron2's tools/lazyconfig_train_net.py does"
            )
    if config.dataloader.get("test") and not config.dataloader.get("evaluator"):
        raise UserError(
            f"{path}: has a dataloader.test without dataloader.evaluator: define both or neither"
        )


def python_overrides(path: str, opts: Sequence) -> List[str]:
    """Changes to a config as its file wants them: as they are for YAML; for a Python config
    ``path.key=value``, whatever is KEY VALUE in the names of YAML.

    Args:
        path: of the config file.
        opts: KEY VALUE ...; words with "=" stay as they are.

    Raises:
        UserError: for a key that Python configs lack.
    """
    words = [str(word) for word in opts]
    if not is_python(path):
        return words
    changes, rest = [], iter(words)
    for word in rest:
        if "=" in word:
            changes.append(word)
            continue
        head, _, tail = word.partition(".")
        place = PLACES.get(word) or (head in NODES and f"{NODES[head]}.{tail}")
        if not place:
            raise UserError(f"{word} has no place in a Python config, such as {path}")
        changes.append(f"{place}={_hydra(_decoded(next(rest, '')))}")
    return changes


def _decoded(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _hydra(value: Any) -> str:
    """A value in Hydra's syntax of overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_hydra(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_hydra, value)) + "]"
    if isinstance(value, str):
        return '"' + value.replace('"', '\\"') + '"'
    return "null" if value is None else str(value)

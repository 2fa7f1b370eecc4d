"""The Python config of a run, which its ``CfgNode`` carries with it."""

import contextlib
import sys
from typing import Any, ContextManager, Optional, Tuple

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from d2kd.schema import get_value, plain_values

from .places import NODES, OWN_DEFAULTS, PLACES, errors_in_lazy_words
from .text import to_text

_ABSENT = object()


def target_of(call: DictConfig) -> Any:
    """The class or function that a call is of; None if it is no call.

    Raises:
        ImportError: if it is given by a name that cannot be found.
    """
    target = call.get("_target_")
    return locate(target) if isinstance(target, str) else target


def test_size(config: DictConfig) -> Optional[Tuple[int, int]]:
    """The short side, and the most for the longer one, to which images are resized in testing, as
    ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST`` say it; None if that is done in another way."""
    calls = OmegaConf.select(config, "dataloader.test.mapper.augmentations", default=None)
    if calls is None or len(calls) != 1 or target_of(calls[0]) is not ResizeShortestEdge:
        return None
    side, most = calls[0].short_edge_length, calls[0].get("max_size", sys.maxsize)
    return (min(side) if isinstance(side, ListConfig) else side), most


def checkpoints_kept(program: DictConfig) -> int:
    """How many checkpoints are to stay by a Python config's own key; 0 = all."""
    return OmegaConf.select(program, "train.checkpointer.max_to_keep") or 0


def is_lazy(cfg: CfgNode) -> bool:
    """Whether a run's config comes from a Python program."""
    return "LAZY" in cfg


def errors_in_words_of(cfg: CfgNode) -> ContextManager[None]:
    """Lets the messages of errors speak of a run's keys as its config has them."""
    return errors_in_lazy_words() if is_lazy(cfg) else contextlib.nullcontext()


def lazy_config(cfg: CfgNode) -> DictConfig:
    """The Python config of a run, with what its ``CfgNode`` says."""
    config = OmegaConf.create(yaml.unsafe_load(cfg.LAZY), flags={"allow_objects": True})
    defaults = get_cfg()
    for key, place in PLACES.items():
        value = get_value(cfg, key)
        there = OmegaConf.select(config, place, default=_ABSENT) is not _ABSENT
        if there or value != _default(defaults, key):
            if isinstance(value, tuple):
                value = value[0] if len(value) == 1 else list(value)
            OmegaConf.update(config, place, value, merge=False, force_add=True)
    for key, place in NODES.items():
        OmegaConf.update(config, place, plain_values(cfg[key]), merge=False)
    if checkpoints_kept(config) == cfg.RUN.KEEP_CHECKPOINTS:  # where it was said, it can be changed
        config.run.KEEP_CHECKPOINTS = 0
    return config


def _default(defaults: CfgNode, key: str) -> Any:
    return OWN_DEFAULTS[key] if key in OWN_DEFAULTS else get_value(defaults, key)


def config_text(cfg: CfgNode) -> str:
    """The whole config of a run, for people."""
    return to_text(lazy_config(cfg)) if is_lazy(cfg) else cfg.dump()


def set_num_classes(node: Any, number: int) -> None:
    """Gives every call within a model that number of classes, but those that take another's.

    Args:
        node: the model, or a part of it; changed in place.
        number: of the classes.
    """
    if isinstance(node, ListConfig):
        for entry in node:
            set_num_classes(entry, number)
    elif isinstance(node, DictConfig):
        for key in node:
            if OmegaConf.is_interpolation(node, key):
                continue
            if key == "num_classes":
                node[key] = number
            elif key != "sem_seg_head":
                set_num_classes(node[key], number)

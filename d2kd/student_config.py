"""The student's own config, which stock Detectron2 reads."""

import os
from typing import Set, Tuple

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from d2kd.config import SOLVER_KEYS, default_config
from d2kd.model_zoo import FINAL_WEIGHTS
from d2kd.modeling.config import NODES

# The nodes of MODEL that are of backbones
_BODIES = ("TIMM", "BASIC_RESNET")


def needs_d2kd(cfg: CfgNode) -> bool:
    """Whether the student's architecture or backbone comes from d2kd, not from Detectron2."""
    parts = (*_architectures(cfg), BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME))
    return any(part.__module__.startswith("d2kd.") for part in parts)


def _architectures(cfg: CfgNode) -> Tuple:
    """The student's architecture and what it is derived from."""
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return getattr(architecture, "__mro__", (architecture,))


def _nodes_read(cfg: CfgNode) -> Set[str]:
    """Which of d2kd's nodes of MODEL the student's architecture and backbone may read."""
    backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    bodies = () if backbone.__module__.startswith("detectron2.") else _BODIES
    return {kind.__name__ for kind in _architectures(cfg)}.union(bodies)


def student_config(cfg: CfgNode) -> CfgNode:
    """The student's own config: what differs from the defaults, without d2kd's keys.

    It builds the student in stock Detectron2. Only an architecture or backbone that Detectron2
    lacks keeps its node, and needs :func:`~d2kd.config.add_distill_config` to be
    read.

    Args:
        cfg: the config of a run.
    """
    cfg, defaults = cfg.clone(), default_config()
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = False  # the run's own weights fill everything
    for name in set(NODES) - _nodes_read(cfg):
        del cfg.MODEL[name]
    del cfg.MODEL.FPN["RELU_BEFORE_P7"]  # the backbone's name tells
    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, FINAL_WEIGHTS)
    del cfg["DISTILL"], cfg["RUN"], cfg.DATASETS["DESCRIBED"]
    for key in SOLVER_KEYS:
        del cfg.SOLVER[key]
    student = _difference(cfg, defaults)
    student.VERSION = cfg.VERSION
    return student


def _difference(cfg: CfgNode, defaults: CfgNode) -> CfgNode:
    changed = CfgNode()
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            value = _difference(value, defaults.get(key, CfgNode()))
            if value:
                changed[key] = value
        elif value != defaults.get(key):
            changed[key] = value
    return changed

"""The student's own config, which stock Detectron2 reads."""

import os
from typing import List, Set, Tuple

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from d2kd.config import SOLVER_KEYS, default_config
from d2kd.model_zoo import FINAL_WEIGHTS
from d2kd.modeling.config import NODES
from d2kd.schema import changed

# The nodes of MODEL that are of backbones
_BODIES = ("TIMM", "BASIC_RESNET")
_FOUNDATIONS = frozenset(("abc", "builtins", "detectron2", "fvcore", "torch", "typing"))


def modules_needed(cfg: CfgNode) -> List[str]:
    """The modules beside Detectron2 that the student's architecture and backbone come from, and
    that have to be imported before they can be built; of d2kd, the one that imports all."""
    packages = {part.__module__: part.__module__.partition(".")[0] for part in _parts(cfg)}
    of_users = {m for m, package in packages.items() if package not in (*_FOUNDATIONS, "d2kd")}
    ours = ["d2kd.modeling"] if "d2kd" in packages.values() else []
    return [*ours, *sorted(of_users)]


def _parts(cfg: CfgNode) -> Tuple:
    """The student's backbone, its architecture and what that is derived from."""
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    return (*getattr(architecture, "__mro__", (architecture,)), backbone)


def _nodes_read(cfg: CfgNode) -> Set[str]:
    """Which of d2kd's nodes of MODEL the student's architecture and backbone may read; those of the
    user may read any."""
    *architectures, backbone = _parts(cfg)
    if any(module != "d2kd.modeling" for module in modules_needed(cfg)):
        return set(NODES)
    bodies = () if backbone.__module__.startswith("detectron2.") else _BODIES
    return {kind.__name__ for kind in architectures}.union(bodies)


def student_config(cfg: CfgNode) -> CfgNode:
    """The student's own config: what differs from the defaults, without d2kd's keys.

    It builds the student in stock Detectron2. Only an architecture or backbone that Detectron2
    lacks keeps its node, and needs :func:`~d2kd.config.add_distill_config` and what
    :func:`modules_needed` says to be read.

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
    student = changed(cfg, defaults)
    student.VERSION = cfg.VERSION
    return student

"""Every config key that d2kd adds to Detectron2's, and how config files are read."""

import os
import re
from typing import Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from yaml import YAMLError

from d2kd.errors import UserError, nearest


def add_distill_config(cfg: CfgNode) -> None:
    """Adds d2kd's keys to a config made by ``detectron2.config.get_cfg``.

    ``MODEL`` describes the student, as in any Detectron2 config; ``DISTILL`` what teaches it.
    Each method's own node, ``DISTILL.<METHOD>``, is described in its file in ``d2kd/methods``.
    """
    from d2kd.methods import DISTILLER_REGISTRY
    from d2kd.modeling.meta_arch.config import add_dense_detector_config

    add_dense_detector_config(cfg)
    # The optimizer: SGD (Detectron2's own builder) or AdamW
    cfg.SOLVER.OPTIMIZER = "SGD"

    cfg.DISTILL = CfgNode()
    # The methods to train with, by name; none = the plain student
    cfg.DISTILL.METHODS = []
    cfg.DISTILL.TEACHER = CfgNode()
    # The teacher's config: a file, a recipe of d2kd, or a name in Detectron2's model zoo
    cfg.DISTILL.TEACHER.CONFIG = ""
    # Its weights: a file, a URL, a detectron2:// or d2kd:// name; empty = the model zoo's for
    # CONFIG, else MODEL.WEIGHTS of CONFIG
    cfg.DISTILL.TEACHER.WEIGHTS = ""
    # Changes to the teacher's config: KEY VALUE KEY VALUE ...
    cfg.DISTILL.TEACHER.OPTS = []
    # float32, float16 or bfloat16; empty = as the student runs
    cfg.DISTILL.TEACHER.PRECISION = ""
    for name, method in DISTILLER_REGISTRY:
        cfg.DISTILL[name.upper()] = method.default_config()


def load_yaml(cfg: CfgNode, path: str, opts: Sequence = (), opts_key: str = "command line") -> None:
    """Merges a YAML file (with its ``_BASE_``) and overrides into a config. A timm backbone brings
    its mean, std and channel order.

    Args:
        cfg: changed in place.
        path: the file.
        opts: KEY VALUE KEY VALUE ...
        opts_key: where ``opts`` come from, for messages.

    Raises:
        UserError: for a key that does not exist, a value of the wrong type, or a broken file.
    """
    from d2kd.modeling.backbone.timm import use_timm_pixels

    if len(opts) % 2:
        raise UserError(f"{opts_key}: give pairs of KEY VALUE, not {len(opts)} words: {list(opts)}")
    for source, merge in ((path, cfg.merge_from_file), (opts_key, cfg.merge_from_list)):
        try:
            merge(path if source == path else list(opts))
        except (KeyError, AssertionError) as e:
            raise UserError(f"{source}: {_unknown_key(cfg, str(e))}") from e
        except (ValueError, YAMLError, OSError) as e:
            raise UserError(f"{source}: {' '.join(str(e).split())}") from e
    use_timm_pixels(cfg)


def _unknown_key(cfg: CfgNode, message: str) -> str:
    match = re.search(r"Non-existent (?:config )?key: ([\w.]+)", message)
    if match is None:
        return " ".join(message.split())
    return f"no config key {match[1]}: {nearest(match[1], _keys(cfg))}"


def _keys(node: CfgNode, prefix: str = ""):
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")


def needs_d2kd(cfg: CfgNode) -> bool:
    """Whether the student's architecture or backbone comes from d2kd, not from Detectron2."""
    parts = (
        META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE),
        BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME),
    )
    return any(part.__module__.startswith("d2kd.") for part in parts)


def student_config(cfg: CfgNode) -> CfgNode:
    """The student's own config: what differs from the defaults, without d2kd's keys.

    It builds the student in stock Detectron2. Only an architecture or backbone that Detectron2
    lacks keeps its node, and needs :func:`add_distill_config` to be read.

    Args:
        cfg: the config of a run.
    """
    cfg, defaults = cfg.clone(), get_cfg()
    add_distill_config(defaults)
    cfg.defrost()
    if not needs_d2kd(cfg):
        for name in set(cfg.MODEL) - set(get_cfg().MODEL):
            del cfg.MODEL[name]
    else:
        cfg.MODEL.TIMM.PRETRAINED = False  # the run's own weights fill everything
    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    del cfg["DISTILL"]
    del cfg.SOLVER["OPTIMIZER"]
    student = _difference(cfg, defaults)
    student.VERSION = cfg.VERSION
    return student


def _difference(cfg: CfgNode, defaults: CfgNode) -> CfgNode:
    changed = CfgNode()
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            value = _difference(value, defaults[key])
            if value:
                changed[key] = value
        elif value != defaults[key]:
            changed[key] = value
    return changed

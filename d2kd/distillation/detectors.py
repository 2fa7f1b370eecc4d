"""Detectors from their configs: the student, and the teacher before its weights are read."""

import contextlib
from typing import Iterator, NamedTuple, Sequence

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.layers import CNNBlockBase
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig
from torch import nn
from torch.overrides import TorchFunctionMode

from d2kd.checkpoint import refuse_missing
from d2kd.config import read_config
from d2kd.errors import UserError, building, nearest
from d2kd.lazy import is_lazy, is_python, lazy_config, load_program
from d2kd.model_zoo import resolve_config, shipped_weights, trained_weights, zoo_weights
from d2kd.modeling.backbone import check_p7

_SMALL = 0.1  # what residual blocks of a random teacher add, relative to their initialisation


class TeacherSource(NamedTuple):
    """A teacher before its weights are read."""

    detector: nn.Module  # as initialised, on the CPU, or without numbers on the meta device
    input_format: str  # channel order of its images
    weights: str  # where they are


def build_detector(cfg: CfgNode, source: str = "the student's config") -> nn.Module:
    """The detector that ``MODEL.META_ARCHITECTURE`` names, or that a Python config describes, on
    ``MODEL.DEVICE``.

    Args:
        cfg: of the detector.
        source: where it comes from, for messages.

    Raises:
        UserError: if the name is unknown, the device is not there, or Detectron2 refuses to build
            what the config describes.
    """
    device = _device(cfg)
    detector = build_architecture(cfg, source)
    return detector.to(device)


class _ConstantsOnCPU(TorchFunctionMode):
    """Keeps ``torch.tensor`` and ``torch.linspace`` on the CPU: constructors read their numbers, of
    anchors for instance."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.linspace):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """What is built inside has parameters of torch's meta device, with shapes but without numbers,
    which takes neither time nor memory."""
    with torch.device("meta"), _ConstantsOnCPU():
        yield


def _device(cfg: CfgNode) -> torch.device:
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE is '{name}': give cpu, cuda or cuda:<number>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = f"torch sees {torch.cuda.device_count()}" if torch.cuda.device_count() else ""
        raise UserError(
            f"MODEL.DEVICE is '{name}' but no {'such ' if there else ''}CUDA device is available"
            f"{f' ({there})' if there else ''}: add 'MODEL.DEVICE cpu' at the end of the command"
        )
    # Random streams, clocks and memory are those of the current one
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def build_architecture(cfg: CfgNode, source: str) -> nn.Module:
    """Builds a detector on torch's default device; :func:`build_detector` moves it to
    ``MODEL.DEVICE``."""
    if is_lazy(cfg):
        return _instantiated(lazy_config(cfg).model, source)
    name = cfg.MODEL.META_ARCHITECTURE
    known = [k for k, _ in META_ARCH_REGISTRY if k != "TeacherStudent"]  # it is put around one
    if name not in known:
        raise UserError(f"MODEL.META_ARCHITECTURE is '{name}': {nearest(name, known)}")
    with building(f"{source}: {name}"):
        detector = META_ARCH_REGISTRY.get(name)(cfg)
    check_p7(cfg, getattr(detector, "backbone", None))
    return detector


def _instantiated(model: DictConfig, source: str) -> nn.Module:
    """The detector that a Python config describes."""
    with building(f"{source}: its model"):
        detector = instantiate(model)
    if not isinstance(detector, nn.Module):
        raise UserError(f"{source}: its 'model' is no detector, but {type(detector).__name__}")
    return detector


def build_teacher_detector(cfg: CfgNode) -> TeacherSource:
    """The teacher as initialised, on the CPU: weights are read there, so that the processes of a
    run do not meet on one device.

    Raises:
        UserError: if there is no such config, or it cannot be built.
    """
    node = cfg.DISTILL.TEACHER
    if not node.CONFIG:
        raise UserError(
            f"DISTILL.TEACHER.CONFIG is empty, but DISTILL.METHODS is {list(cfg.DISTILL.METHODS)}: "
            "give the teacher's config file, or a name in Detectron2's model zoo"
        )
    path = resolve_config(node.CONFIG, "DISTILL.TEACHER.CONFIG")
    weights = node.WEIGHTS or zoo_weights(path) or trained_weights(path)
    if is_python(path):
        return _lazy_teacher(path, node.OPTS, weights)
    teacher_cfg = read_config(path, node.OPTS, "DISTILL.TEACHER.OPTS")
    teacher_cfg.MODEL.TIMM.PRETRAINED = False  # its checkpoint fills everything
    detector = build_architecture(teacher_cfg, path)
    weights = weights or teacher_cfg.MODEL.WEIGHTS or shipped_weights(path)
    return TeacherSource(detector, teacher_cfg.INPUT.FORMAT, weights)


def _lazy_teacher(path: str, opts: Sequence, weights: str) -> TeacherSource:
    """A teacher whose config is a Python program."""
    key = "DISTILL.TEACHER.OPTS"
    if not all("=" in str(word) for word in opts):
        if len(opts) % 2:
            raise UserError(f"{key}: give pairs of KEY VALUE, not {len(opts)} words: {list(opts)}")
        opts = [f"{name}={value}" for name, value in zip(opts[::2], opts[1::2])]
    lazy = load_program(path, opts, key)
    if "model" not in lazy:
        raise UserError(f"{path}: defines no 'model': give a LazyConfig of a detector")
    detector = _instantiated(lazy.model, path)
    mapper = lazy.get("dataloader", {}).get("train", {}).get("mapper", {})
    weights = weights or lazy.get("train", {}).get("init_checkpoint", "")
    return TeacherSource(detector, mapper.get("image_format", "BGR"), weights)


def teacher_on_meta(cfg: CfgNode, teacher_opts: Sequence = ()) -> TeacherSource:
    """The teacher of a config, on the meta device.

    Args:
        cfg: of the student.
        teacher_opts: further changes to the teacher's config, KEY VALUE ...
    """
    cfg = cfg.clone()
    cfg.DISTILL.TEACHER.OPTS = [*cfg.DISTILL.TEACHER.OPTS, *teacher_opts]
    with on_meta_device():
        return build_teacher_detector(cfg)


def student_on_meta(cfg: CfgNode) -> nn.Module:
    """The student of a config, on the meta device."""
    cfg = cfg.clone()
    cfg.MODEL.TIMM.PRETRAINED = False
    with on_meta_device():
        return build_architecture(cfg, "the student's config")


def million_parameters(detector: nn.Module) -> float:
    """How many parameters a detector has, in millions, frozen ones included."""
    return sum(p.numel() for p in detector.parameters()) / 1e6


def refuse_missing_weights(cfg: CfgNode, weights: str) -> None:
    """
    Args:
        cfg: of a run that distils.
        weights: of its teacher, see :class:`TeacherSource`.

    Raises:
        UserError: if there are none, or no such file. What is in it is not read.
    """
    config = cfg.DISTILL.TEACHER.CONFIG
    if not weights:
        raise UserError(
            f"DISTILL.TEACHER.WEIGHTS is empty, and no weights are known for {config}: train it "
            f"first (d2kd train --config-file {config}), or give its checkpoint"
        )
    refuse_missing(weights, "DISTILL.TEACHER.WEIGHTS")


def save_random_teacher(cfg: CfgNode, path: str) -> None:
    """Writes the weights of a teacher as initialised, to try a config without the real ones. What
    its residual blocks add is made small: otherwise the maps of a deep one grow beyond float16,
    which those of a trained one do not.

    Args:
        cfg: of a run that distils.
        path: of the new file.
    """
    detector = build_teacher_detector(cfg).detector
    for block in detector.modules():
        last = getattr(block, "conv3", getattr(block, "conv2", None))
        if isinstance(block, CNNBlockBase) and last is not None:
            scaled = last if getattr(last, "norm", None) is None else last.norm
            scaled.weight.data.mul_(_SMALL)
    torch.save({"model": detector.state_dict()}, path)

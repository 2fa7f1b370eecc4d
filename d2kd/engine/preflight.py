"""What is checked before a run starts, so that it fails now and not later."""

import os
import tempfile
from typing import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from d2kd.data.check import (
    check_annotation_files,
    check_dataset_names,
    check_evaluation,
)
from d2kd.data.classes import class_names_of
from d2kd.data.loader import images_per_process
from d2kd.errors import UserError
from d2kd.lazy import is_lazy, lazy_config
from d2kd.views import find_family
from d2kd.writing import cannot_write

from .evaluators import refuse_without_evaluator
from .scaling import scale_to_processes

_COCO_KEYPOINTS = 17
_STOCK_FCOS = "detectron2.modeling.meta_arch.fcos.FCOS"


def refuse_processes(cfg: CfgNode, local_count: int, count: int, training: bool) -> None:
    """
    Args:
        cfg: of the run.
        local_count, count: processes of this machine, and of the run.
        training: whether they train.

    Raises:
        UserError: if they have no GPUs of their own, or cannot share a batch.
    """
    device, gpus = cfg.MODEL.DEVICE, torch.cuda.device_count()
    if device.startswith("cuda") and local_count > max(gpus, 1):
        raise UserError(
            f"--num-gpus is {local_count}, but torch sees {gpus}: more processes than GPUs "
            "can run on a CPU alone, with 'MODEL.DEVICE cpu' at the end of the command"
        )
    if device.startswith("cuda:") and count > 1:
        raise UserError(
            f"MODEL.DEVICE is '{device}', but {count} processes have a GPU each: give cuda, and "
            "choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if training:
        images_per_process(scale_to_processes(cfg, count).SOLVER.IMS_PER_BATCH, count)


def refuse_unusable(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: for settings under which training or saving cannot work, or data that cannot be
            trained or evaluated with.
    """
    refuse_unwritable(cfg.OUTPUT_DIR)
    refuse_settings(cfg)
    if cfg.DATASETS.TRAIN:  # an empty one has its own message
        check_dataset_names(cfg)
        _refuse_nameless_keypoints(cfg)
        check_annotation_files(cfg)
        refuse_no_evaluation(cfg)


def refuse_not_evaluated(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: for data that a detector cannot be evaluated with, or a folder that takes no
            results.
    """
    refuse_unwritable(cfg.OUTPUT_DIR)
    check_annotation_files(cfg, training=False)
    refuse_no_evaluation(cfg, training=False)


def refuse_no_evaluation(cfg: CfgNode, training: bool = True) -> None:
    """Refuses sets of DATASETS.TEST that cannot be evaluated on. A Python config brings its own
    evaluator, which may be for sets of another kind.

    Args:
        cfg: of a run.
        training: see :func:`~d2kd.data.check.check_evaluation`.

    Raises:
        UserError: see there; and for a kind of set that d2kd has no evaluator for.
    """
    if is_lazy(cfg):
        check_evaluation(cfg, training)
    else:
        check_evaluation(cfg, training, refuse_without_evaluator)


def refuse_settings(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: for settings under which no training can work. Nothing is read or written.
    """
    if cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        raise UserError(
            f"SOLVER.CHECKPOINT_PERIOD is {cfg.SOLVER.CHECKPOINT_PERIOD}: give the steps between "
            "two checkpoints, 1 or more (above SOLVER.MAX_ITER, only the last one is written)"
        )
    if cfg.SOLVER.MAX_ITER < 1:
        raise UserError(f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}: give 1 or more steps")
    _refuse_sigmas(cfg)
    if cfg.TEST.AUG.ENABLED:
        raise UserError(
            "TEST.AUG.ENABLED is True, but d2kd evaluates without test-time augmentation: set it "
            "to False"
        )
    if cfg.SOLVER.AMP.ENABLED and is_lazy(cfg) and _target(cfg) == _STOCK_FCOS:
        raise UserError(
            f"SOLVER.AMP.ENABLED is True, but the box loss of {_STOCK_FCOS} does not run in mixed "
            "precision: set it to False, or take d2kd.modeling.meta_arch.FCOS, which is the same "
            "but for that"
        )
    device = cfg.MODEL.DEVICE
    if cfg.SOLVER.AMP.ENABLED and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(
            f"SOLVER.AMP.ENABLED is True, but MODEL.DEVICE is '{device}': mixed precision needs a "
            "CUDA device; set it to False"
        )


def _target(cfg: CfgNode) -> str:
    """The class that a Python config builds its detector of."""
    target = lazy_config(cfg).model.get("_target_", "")
    parts = (getattr(target, x, "") for x in ("__module__", "__qualname__"))
    return target if isinstance(target, str) else ".".join(parts)


def _refuse_sigmas(cfg: CfgNode) -> None:
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or _COCO_KEYPOINTS
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if cfg.MODEL.KEYPOINT_ON and cfg.DATASETS.TEST and sigmas != keypoints:
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} numbers (without any, COCO's), but "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {keypoints}: give one for each"
        )


def _refuse_nameless_keypoints(cfg: CfgNode) -> None:
    """Flipping an image exchanges left and right keypoints, by what the set says of them."""
    for name in cfg.DATASETS.TRAIN if cfg.MODEL.KEYPOINT_ON else ():
        if not MetadataCatalog.get(name).get("keypoint_names"):
            raise UserError(
                f"MODEL.KEYPOINT_ON is True, but '{name}' of DATASETS.TRAIN names no keypoints: "
                "register it in Python, with keypoint_names and keypoint_flip_map in its metadata"
            )


def refuse_other_classes(names: Sequence[str], student: nn.Module) -> None:
    """
    Args:
        names: of the training sets.
        student: as it was built.

    Raises:
        UserError: if the data has another number of classes than the student.
    """
    family = find_family(student)  # a plain detector may be of a kind without one
    in_data = next(filter(None, (len(class_names_of([name])) for name in names)), None)
    in_model = family and family.num_classes
    if None not in (in_data, in_model) and in_data != in_model:
        raise UserError(
            f"DATASETS.TRAIN {tuple(names)} has {in_data} classes, but the student predicts "
            f"{in_model}: set NUM_CLASSES of its head in MODEL"
        )


def refuse_unwritable(folder: str) -> None:
    """
    Raises:
        UserError: if no file can be made in a folder.
    """
    if "://" in folder:
        raise UserError(f"OUTPUT_DIR is '{folder}': give a folder of this machine's file systems")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"OUTPUT_DIR is '{folder}': {cannot_write(folder, e)}") from e

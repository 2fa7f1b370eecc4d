"""What a run with a Python config (LazyConfig) builds in its own way: optimizer, schedule, data,
evaluators. All else goes by the ``CfgNode`` that carries it, as in any run."""

import inspect
import logging
import os
from typing import Any, Dict, List

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.solver import LRMultiplier
from detectron2.solver.build import reduce_param_groups
from omegaconf import DictConfig, ListConfig
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from d2kd.data.bad_images import NamingLoader, NamingMapper
from d2kd.data.check import load_training_dicts
from d2kd.data.loader import ResumableLoader
from d2kd.distillation import LOG_PERIOD, TeacherStudent
from d2kd.errors import UserError, building
from d2kd.lazy import lazy_config, target_of

from .optimizer import heed_distillers

logger = logging.getLogger(__name__)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """``optimizer``, for the parameters of a student and its distillers, or of a plain one."""
    call = lazy_config(cfg).optimizer
    # The student's parameters have the names that they have in plain training: rules for learning
    # rates, as ViTDet's, go by them.
    distilled = isinstance(model, TeacherStudent)
    parts = [model.student, model.distillers] if distilled else [model]
    groups = [group for part in parts for group in _parameter_groups(call, part)]
    call.params = {"_target_": lambda: reduce_param_groups(groups)}
    optimizer = _build(call, "optimizer")
    heed_distillers(optimizer, model)
    return optimizer


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """``lr_multiplier`` over ``train.max_iter`` steps."""
    multiplier = _build(lazy_config(cfg).lr_multiplier, "lr_multiplier")
    return LRMultiplier(optimizer, multiplier, cfg.SOLVER.MAX_ITER)


def build_train_loader(cfg: CfgNode) -> ResumableLoader:
    """``dataloader.train``, which can be resumed.

    Raises:
        UserError: if it is not of Detectron2's kind, or its data cannot be used.
    """
    call = lazy_config(cfg).dataloader.train
    if target_of(call) != build_detection_train_loader:
        raise UserError(
            f"dataloader.train calls {call.get('_target_')}: d2kd resumes what Detectron2's "
            "build_detection_train_loader loads; give L(build_detection_train_loader)(...)"
        )
    dataset = load_training_dicts(cfg, lambda: instantiate(call.dataset))
    sampler = _build(call.get("sampler"), "dataloader.train.sampler")
    return ResumableLoader(
        dataset=dataset,
        sampler=TrainingSampler(len(dataset)) if sampler is None else sampler,
        mapper=_build(call.mapper, "dataloader.train.mapper"),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=call.get("aspect_ratio_grouping", True),
        num_workers=call.get("num_workers", 0),
        seed=cfg.SEED,
        skip_bad_images=cfg.RUN.SKIP_BAD_IMAGES,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> NamingLoader:
    """``dataloader.test`` for one of its data sets."""
    call = _evaluation(cfg, dataset_name).test
    mapper = NamingMapper(_build(call.mapper, "dataloader.test.mapper"))
    call.mapper = {"_target_": lambda: mapper}
    return NamingLoader(_build(call, "dataloader.test"))


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """``dataloader.evaluator`` for one data set; it writes into the run's folder."""
    calls = _evaluation(cfg, dataset_name).evaluator
    evaluators = []
    for call in calls if isinstance(calls, ListConfig) else [calls]:
        if "output_dir" in inspect.signature(target_of(call)).parameters:
            call.output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        evaluators.append(_build(call, "dataloader.evaluator"))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def set_up_training(cfg: CfgNode, model: nn.Module) -> None:
    """Heeds ``train.ddp``, and says what else of ``train`` is not heeded.

    Args:
        cfg: of the run.
        model: as it is trained, by one process or several.
    """
    settings = lazy_config(cfg).train
    if settings.get("log_period", LOG_PERIOD) != LOG_PERIOD:
        logger.warning(f"train.log_period is not heeded: metrics come every {LOG_PERIOD} steps")
    if not isinstance(model, DistributedDataParallel):
        return
    on = [name for name, value in settings.get("ddp", {}).items() if value]
    if "fp16_compression" in on:
        on.remove("fp16_compression")
        model.register_comm_hook(state=None, hook=fp16_compress_hook)
    if on:
        logger.warning(f"train.ddp is not heeded in {', '.join(on)}")


def _parameter_groups(optimizer: DictConfig, module: nn.Module) -> List[Dict[str, Any]]:
    call = optimizer.get("params")
    if not isinstance(call, DictConfig):
        raise UserError(
            "optimizer.params is missing: give L(get_default_optimizer_params)(), to which the "
            "model is given as 'model'"
        )
    call.model = module
    return _build(call, "optimizer.params")


def _evaluation(cfg: CfgNode, dataset_name: str) -> DictConfig:
    """``dataloader`` with one of several test sets alone."""
    dataloader = lazy_config(cfg).dataloader
    dataloader.test.dataset.names = dataset_name
    return dataloader


def _build(call: Any, place: str) -> Any:
    with building(place):
        return instantiate(call)

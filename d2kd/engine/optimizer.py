"""Optimizers: Detectron2's own, AdamW, clipping of the norm of all gradients together, parameters
that do not decay."""

import contextlib
from typing import Dict, Iterator, List

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, get_default_optimizer_params
from detectron2.solver import build_lr_scheduler as build_schedule
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from d2kd.distillation import TeacherStudent
from d2kd.errors import UserError, building

# SOLVER.CLIP_GRADIENTS.CLIP_TYPE beside Detectron2's "value" and "norm", which go by parameter
TOTAL_NORM = "full_model"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``SOLVER`` describes; of a distiller, some parameters do not decay.

    Args:
        cfg: ``SOLVER.OPTIMIZER`` is SGD or AdamW. ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` "full_model"
            clips the norm of all gradients together at ``CLIP_VALUE``, as MMDetection does.
        model: a student with its teacher, or a plain one.

    Raises:
        UserError: if torch or Detectron2 refuse a value.
    """
    with building("the optimizer that SOLVER describes"):
        return _build_optimizer(cfg, model)


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Detectron2's schedule of the learning rate.

    Raises:
        UserError: if Detectron2 refuses a value.
    """
    with building("the schedule of the learning rate that SOLVER describes"):
        return build_schedule(cfg, optimizer)


@contextlib.contextmanager
def hyperparameters_kept(
    optimizer: torch.optim.Optimizer, schedule: LRMultiplier
) -> Iterator[None]:
    """While the states of both are loaded: learning rates, momentum and decay stay those that the
    config says, which a run that is told to go on with other ones has changed. The state of the
    parameters and the place on the schedule are those of the file.

    Args:
        optimizer: as it was built.
        schedule: of its learning rate.

    Raises:
        UserError: if the state is that of an optimizer of another kind.
    """
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    base_lrs = list(schedule.base_lrs)
    yield
    schedule.base_lrs = base_lrs
    for group, built, lr in zip(optimizer.param_groups, groups, schedule.get_lr()):
        if ("betas" in group) != ("betas" in built):  # AdamW's, which SGD has not
            raise UserError(
                "the run that is resumed had an optimizer of another kind (SOLVER.OPTIMIZER): give "
                "the same, or its checkpoint as MODEL.WEIGHTS and another OUTPUT_DIR"
            )
        group.update({**built, "lr": lr})


def _build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    decay = cfg.SOLVER.WEIGHT_DECAY_BIAS
    if not isinstance(decay, (int, float, type(None))):  # without a type in Detectron2's config
        raise UserError(f"SOLVER.WEIGHT_DECAY_BIAS is {decay!r}, expected a number")
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    total = clipping.ENABLED and clipping.CLIP_TYPE == TOTAL_NORM
    if cfg.SOLVER.OPTIMIZER == "SGD" and not total:
        optimizer = build_sgd(cfg, model)
    else:
        kind = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[cfg.SOLVER.OPTIMIZER]
        if total:
            kind = _with_total_norm(kind, clipping.CLIP_VALUE)
        else:
            kind = maybe_add_gradient_clipping(cfg, kind)
        optimizer = kind(_parameters(cfg, model), **_options(cfg))
    heed_distillers(optimizer, model)
    return optimizer


def _parameters(cfg: CfgNode, model: nn.Module) -> List[Dict]:
    """As Detectron2's ``build_optimizer`` groups them."""
    return get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )


def _options(cfg: CfgNode) -> Dict:
    options = {"lr": cfg.SOLVER.BASE_LR, "weight_decay": cfg.SOLVER.WEIGHT_DECAY}
    if cfg.SOLVER.OPTIMIZER == "SGD":
        options.update(momentum=cfg.SOLVER.MOMENTUM, nesterov=cfg.SOLVER.NESTEROV)
    return options


def _with_total_norm(kind: type, max_norm: float) -> type:
    """An optimizer class that clips the norm of all gradients together before its step."""

    class TotalNormClipping(kind):
        def step(self, closure=None):
            parameters = [p for group in self.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            return super().step(closure)

    return TotalNormClipping


def heed_distillers(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Sets the weight decay of what the distillers of a model do not want to decay to 0, and lets
    a step leave alone what learns nothing in it, such as the adapters before START_ITER."""
    if isinstance(model, TeacherStudent):
        _stop_decay(optimizer, _not_decayed(model))
        optimizer.register_step_pre_hook(lambda *_: model.forget_idle())


def _not_decayed(model: TeacherStudent) -> List[nn.Parameter]:
    return [
        parameter
        for distiller in model.distillers.values()
        for name, parameter in distiller.named_parameters()
        if name in distiller.no_weight_decay()
    ]


def _stop_decay(optimizer: torch.optim.Optimizer, parameters: List[nn.Parameter]) -> None:
    """Moves parameters into groups of their own, which differ in that they do not decay."""
    moved = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        ours = [p for p in group["params"] if id(p) in moved]
        if ours:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
            optimizer.add_param_group({**group, "params": ours, "weight_decay": 0.0})

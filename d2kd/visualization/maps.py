"""What a method looks at, taken from one training forward: its maps of every FPN level or stage,
such as FRS's scores and DeFeat's masks, and how much attention G-DetKD pays to every level."""

from typing import Dict, List, NamedTuple, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import Tensor

from d2kd.distillation import TeacherStudent, build_model, fill_from_run
from d2kd.distillation.maps import Maps, kept_maps
from d2kd.engine import DistillTrainer
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY, Distiller

NUM_IMAGES = 2
# Batches over which attention is averaged
NUM_BATCHES = 16


class Attention(NamedTuple):
    """What G-DetKD's levels count in R regions."""

    levels: List[str]
    sizes: np.ndarray  # (R,), √area in pixels
    weights: np.ndarray  # (L, R)


class MethodMaps(NamedTuple):
    """What the methods of a recipe look at."""

    inputs: List[dict]  # a batch, as the training loader gives it
    maps: Dict[str, Maps]  # by method and what they are
    strides: Dict[str, int]  # of levels and stages
    attention: Optional[Attention]

    def __str__(self) -> str:
        parts = [f"{name}, {len(levels)} levels" for name, levels in self.maps.items()]
        if self.attention is not None:
            levels, sizes, _ = self.attention
            parts.append(f"GDetKD, {len(levels)} levels, {len(sizes)} regions")
        return ", ".join(parts)


def collect_maps(cfg: CfgNode) -> MethodMaps:
    """
    Args:
        cfg: of a recipe. Attention is learned: it is that of the checkpoint in ``MODEL.WEIGHTS``.

    Raises:
        UserError: if the recipe has no method whose maps can be had.
    """
    cfg = cfg.clone()
    cfg.SOLVER.IMS_PER_BATCH = NUM_IMAGES
    model = build_model(cfg).train()
    if not isinstance(model, TeacherStudent):
        raise UserError("DISTILL.METHODS is empty, or all weights are 0: nothing to show")
    attends = has_attention(model)
    if attends:
        fill_from_run(model, cfg.MODEL.WEIGHTS)
    loader = iter(DistillTrainer.build_train_loader(cfg))
    inputs, attention = next(loader), None
    with EventStorage(cfg.SOLVER.MAX_ITER // 2):
        with kept_maps(model) as maps, torch.no_grad():
            model(inputs)
        if attends:
            batches = [inputs, *(next(loader) for _ in range(NUM_BATCHES - 1))]
            attention = level_attention(model, batches)
    if not maps and attention is None:
        with_maps = [name for name, method in DISTILLER_REGISTRY if method.maps != Distiller.maps]
        raise UserError(
            f"DISTILL.METHODS is {list(cfg.DISTILL.METHODS)}: they weigh no place more than "
            f"another ({', '.join(with_maps)} do, and GDetKD with MATCH soft)"
        )
    strides = {x.name: x.stride for x in (*model.family.levels, *model.family.stages)}
    return MethodMaps(inputs, maps, strides, attention)


def has_attention(model: TeacherStudent) -> bool:
    """Whether G-DetKD weighs levels in this recipe."""
    methods = dict(model.distillers.items())
    return "GDetKD" in methods and bool(getattr(methods["GDetKD"].imitation, "matched", None))


def level_attention(model: TeacherStudent, batches: List[List[dict]]) -> Attention:
    """The weights of levels in all regions of some training forwards."""
    sizes: List[Tensor] = []
    weights: List[Tensor] = []

    def keep(imitation: torch.nn.Module, args: tuple, _: object) -> None:
        _, _, regions = args
        many, one = imitation.sides(*args)
        of_levels = imitation.weights(imitation.level_pooler(many)(regions.rois), one)
        valid = slice(None) if regions.valid is None else regions.valid
        sizes.append(Boxes.cat(regions.boxes).area().sqrt()[valid])
        weights.append(of_levels[:, valid])

    imitation = model.distillers["GDetKD"].imitation
    handle = imitation.register_forward_hook(keep)
    with torch.no_grad():
        for inputs in batches:
            model(inputs)
    handle.remove()
    names = [level.name for level in imitation.matched]
    return Attention(names, torch.cat(sizes).cpu().numpy(), torch.cat(weights, 1).cpu().numpy())

"""What a method looks at, taken from one training forward: FRS's scores and DeFeat's masks on every
FPN level, and how much attention G-DetKD pays to every level."""

from typing import Callable, Dict, List, NamedTuple, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from d2kd.checkpoint import StudentCheckpointer
from d2kd.distillation import TeacherStudent, build_model
from d2kd.engine import DistillTrainer
from d2kd.errors import UserError
from d2kd.methods import Distiller
from d2kd.views import StudentView, TeacherView

NUM_IMAGES = 2
# Batches over which attention is averaged
NUM_BATCHES = 16

# (N, h, w) by stride
LevelMaps = Dict[int, Tensor]


class Attention(NamedTuple):
    """What G-DetKD's levels count in R regions."""

    levels: List[str]
    sizes: np.ndarray  # (R,), √area in pixels
    weights: np.ndarray  # (L, R)


class Looked(NamedTuple):
    """What the methods of a recipe look at."""

    inputs: List[dict]  # a batch, as the training loader gives it
    maps: Dict[str, LevelMaps]  # by method
    attention: Optional[Attention]

    def __str__(self) -> str:
        parts = [f"{name}, {len(levels)} levels" for name, levels in self.maps.items()]
        if self.attention is not None:
            levels, sizes, _ = self.attention
            parts.append(f"GDetKD, {len(levels)} levels, {len(sizes)} regions")
        return ", ".join(parts)


def look(cfg: CfgNode) -> Looked:
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
        load_run(model, cfg.MODEL.WEIGHTS)
    loader = iter(DistillTrainer.build_train_loader(cfg))
    inputs, attention = next(loader), None
    with EventStorage(cfg.SOLVER.MAX_ITER // 2):
        maps = level_maps(model, inputs)
        if attends:
            batches = [inputs, *(next(loader) for _ in range(NUM_BATCHES - 1))]
            attention = level_attention(model, batches)
    if not maps and attention is None:
        raise UserError(
            f"DISTILL.METHODS is {list(cfg.DISTILL.METHODS)}: maps can be had of {list(MAPS)}, "
            "attention of GDetKD with MATCH soft"
        )
    return Looked(inputs, maps, attention)


def _defeat_masks(
    method: Distiller, student: StudentView, teacher: TeacherView, targets: List[Instances]
) -> LevelMaps:
    return dict(zip([s.stride for s, _ in method.levels], method.masks(student, targets)))


def _frs_scores(
    method: Distiller, student: StudentView, teacher: TeacherView, targets: List[Instances]
) -> LevelMaps:
    strides = [ours.stride for ours, _ in method.levels]
    return dict(zip(strides, method.scores(teacher)))


# Per method: its maps, from what its forward is given
MAPS: Dict[str, Callable[..., LevelMaps]] = {"DeFeat": _defeat_masks, "FRS": _frs_scores}


def level_maps(model: TeacherStudent, inputs: List[dict]) -> Dict[str, LevelMaps]:
    """The maps of every method that has some, from one training forward."""
    maps: Dict[str, LevelMaps] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda method, views, _: maps.update({name: MAPS[name](method, *views)})

    names = [name for name in MAPS if name in model.distillers]
    handles = [model.distillers[name].register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return {name: levels for name, levels in maps.items() if levels}  # DeFeat may have none


def load_run(model: TeacherStudent, path: str) -> None:
    """Fills student and adapters with those of a run.

    Raises:
        UserError: if the file holds no adapters, or others.
    """
    saved = StudentCheckpointer(model.student).load(path)
    if "distillers" not in saved:
        raise UserError(
            f"MODEL.WEIGHTS is '{path}': G-DetKD's attention is learned, give a checkpoint of the "
            "recipe's run"
        )
    try:
        model.distillers.load_state_dict(saved["distillers"])
    except RuntimeError as e:
        raise UserError(
            f"MODEL.WEIGHTS is '{path}': its adapters are not those of this recipe"
        ) from e


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
        of_levels = imitation.weights(imitation.pool_levels(many, regions.rois), one)
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

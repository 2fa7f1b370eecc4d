"""What each method looked at: where its losses pull at the student, and its own maps.

Where a loss pulls is the length of its gradient at every place of an FPN level or backbone stage of
the student, from one training step without an update. It holds for every method alike, and shows
the disagreement of teacher and student as the loss sees it, masks and scores included.

Shapes: N images, C channels, (h, w) the size of a map.
"""

from typing import Dict, List, NamedTuple, Tuple

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from d2kd.distillation import TeacherStudent
from d2kd.distillation.maps import Maps, kept_maps
from d2kd.layers.random import preserve_rng_state
from d2kd.methods.core import loss_name
from d2kd.views import Features, Read, Recorder, Stage, StudentView

_SEED = 0


class GradientMaps(NamedTuple):
    """What one step showed."""

    pulls: Dict[str, Maps]  # by the name of the loss
    values: Dict[str, float]  # of the losses, weighted
    own: Dict[str, Maps]  # a method's own maps, such as "FRS: the teacher's score"
    strides: Dict[str, int]  # of every level and stage that has maps


def gradient_maps(model: TeacherStudent, inputs: List[dict], iteration: int) -> GradientMaps:
    """One training step, without an update. Statistics of the model may change.

    Args:
        model: filled.
        inputs: as the training loader gives them.
        iteration: at which the schedules are taken.
    """
    reads = _maps_read(model, iteration)
    recorder = Recorder(model.family.observed(reads))
    values, own = _step(model, inputs, iteration, recorder)
    sizes = [tuple(x["image"].shape[-2:]) for x in inputs]
    view = StudentView(model.family, reads, recorder, sizes, [])
    maps = _maps_of(view, reads)
    pulls = {name: _pulls(value, maps) for name, value in values.items()}
    return GradientMaps(
        {name: found for name, found in pulls.items() if found},
        {name: value.item() for name, value in values.items()},
        own,
        _strides(model, reads),
    )


def _maps_read(model: TeacherStudent, iteration: int) -> List[Read]:
    """The FPN levels, on which everything but the stages rests, and the stages that are read."""
    ours, _ = model.active_reads(model.active_terms(iteration))
    return [Features(), *sorted((x for x in ours if isinstance(x, Stage)), key=str)]


def _strides(model: TeacherStudent, reads: List[Read]) -> Dict[str, int]:
    """Of FPN levels, and of stages both by their names and by what is read of them."""
    strides = {level.name: level.stride for level in model.family.levels}
    read_stages = [read for read in reads if isinstance(read, Stage)]
    if read_stages:
        by_name = {stage.name: stage.stride for stage in model.family.stages}
        strides.update({name: by_name[r.name] for r in read_stages for name in (r.name, str(r))})
    return strides


def _step(
    model: TeacherStudent, inputs: List[dict], iteration: int, recorder: Recorder
) -> Tuple[Dict[str, Tensor], Dict[str, Maps]]:
    """The weighted losses of the methods, with their graph, and the methods' own maps."""
    model.train()
    with kept_maps(model) as own, preserve_rng_state(), EventStorage(iteration), recorder:
        torch.manual_seed(_SEED)
        losses = model(inputs)
    names = [loss_name(name, term) for name, term in model.schedules]
    return {name: losses[name] for name in names if name in losses}, own


def _maps_of(view: StudentView, reads: List[Read]) -> Dict[str, Tensor]:
    stages = {str(read): view.stage(read) for read in reads if isinstance(read, Stage)}
    return {**view.features, **stages}


def _pulls(loss: Tensor, maps: Dict[str, Tensor]) -> Maps:
    """
    Args:
        loss: a scalar.
        maps: (N, C, h, w) each.
    """
    inputs = {name: x for name, x in maps.items() if x.requires_grad}
    if not loss.requires_grad or not inputs:
        return {}
    gradients = torch.autograd.grad(
        loss, list(inputs.values()), retain_graph=True, allow_unused=True
    )
    pairs = [(name, g) for name, g in zip(inputs, gradients) if g is not None and g.any()]
    return {name: g.float().norm(dim=1).cpu() for name, g in pairs}

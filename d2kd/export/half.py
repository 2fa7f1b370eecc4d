"""Half precision where it costs nothing: in the networks, not in the boxes."""

from typing import Any, Callable

import torch
from torch import Tensor, nn

# Convolutions and layers whose outputs are features, logits and deltas. What turns these into
# boxes stays in float32: half precision counts pixels above 1024 by twos.
_PARTS = ("backbone", "head", "proposal_generator.rpn_head", "roi_heads.box_head")


def halve(detector: nn.Module) -> None:
    """Turns weights and arithmetic of a detector's networks into half precision. Each part gets
    and returns float32.

    Args:
        detector: changed in place.
    """
    modules = dict(detector.named_modules())
    for name in _PARTS:
        if isinstance(modules.get(name), nn.ModuleList):  # the box heads of a cascade
            for stage in modules[name]:
                _halve(stage)
        elif name in modules:
            _halve(modules[name])


def _halve(part: nn.Module) -> None:
    part.half()
    part.register_forward_pre_hook(lambda _, inputs: _converted(inputs, Tensor.half))
    part.register_forward_hook(lambda _, inputs, outputs: _converted(outputs, Tensor.float))


def _converted(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Converts the floating-point tensors in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return convert(value) if torch.is_floating_point(value) else value
    if isinstance(value, dict):
        return {key: _converted(x, convert) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_converted(x, convert) for x in value)
    return value

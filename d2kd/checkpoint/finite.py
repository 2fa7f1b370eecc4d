"""Weights that are numbers."""

from typing import Mapping, Optional

import torch
from torch import Tensor, nn

from d2kd.errors import UserError


def first_not_finite(state: Mapping[str, Tensor]) -> Optional[str]:
    """The name of the first tensor that has NaN or infinity, or None."""
    state = {name: t for name, t in state.items() if t.is_floating_point()}
    if not state or torch.stack([t.isfinite().all() for t in state.values()]).all():
        return None
    return next(name for name, t in state.items() if not t.isfinite().all())


def refuse_not_finite(model: nn.Module, key: str, path: str) -> None:
    """
    Raises:
        UserError: if weights that were read have NaN or infinity.
    """
    name = first_not_finite(model.state_dict())
    if name:
        raise UserError(
            f"{key} is '{path}': its tensor {name} is not finite; give a checkpoint from before "
            "its training diverged"
        )

"""Weights that are numbers."""

from typing import Optional

import torch
from torch import nn

from d2kd.errors import UserError


def first_not_finite(model: nn.Module) -> Optional[str]:
    """The name of the first parameter or buffer that has NaN or infinity, or None."""
    state = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    if not state or torch.stack([t.isfinite().all() for t in state.values()]).all():
        return None
    return next(name for name, t in state.items() if not t.isfinite().all())


def refuse_not_finite(model: nn.Module, key: str, path: str) -> None:
    """
    Raises:
        UserError: if weights that were read have NaN or infinity.
    """
    name = first_not_finite(model)
    if name:
        raise UserError(
            f"{key} is '{path}': its tensor {name} is not finite; give a checkpoint from before "
            "its training diverged"
        )

"""How hard each loss term pulls at the student, beside its detection losses."""

from typing import Dict, Sequence

import torch
from torch import Tensor

# Gradients of half-precision maps would fall below the smallest number.
_SCALE = 2.0**12
_TINY = 1e-12


def gradient_ratios(
    detection: Tensor, terms: Dict[str, Tensor], levels: Sequence[Tensor]
) -> Dict[str, Tensor]:
    """The norm of the gradient that each term sends to the FPN, relative to the norm of what the
    detection losses send there. The graph stays for the backward pass of the step.

    Args:
        detection: the sum of the detector's own losses.
        terms: weighted losses by name.
        levels: the student's FPN levels, (N, C, h, w) each, in the graph of the losses.

    Returns:
        a scalar per term; 0 for those that do not pass the FPN, as losses on backbone stages. None
        at all if there is no FPN, or nothing below it is trained.
    """
    levels = [x for x in levels if x.requires_grad]
    if not levels:
        return {}
    own = _norm(detection, levels).clamp(min=_TINY)
    return {name: _norm(value, levels) / own for name, value in terms.items()}


def _norm(loss: Tensor, levels: Sequence[Tensor]) -> Tensor:
    if not loss.requires_grad:
        return loss.new_zeros(())
    grads = torch.autograd.grad(_SCALE * loss, levels, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads if g is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else loss.new_zeros(())

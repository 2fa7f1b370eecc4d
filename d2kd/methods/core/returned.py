"""What a method returned, before it is weighted: a mistake in it would go on as another loss."""

from typing import Any, Iterable, Tuple

import torch
from torch import Tensor

from d2kd.errors import UserError

from .distiller import Distiller


def check_returned(distiller: Distiller, values: Any, wanted: Iterable[str]) -> None:
    """Looks at names, shapes and graph alone, for which the host does not wait.

    Args:
        distiller: the method.
        values: what its ``forward`` returned.
        wanted: the terms of this step.

    Raises:
        UserError: if these are not the wanted terms, each a tensor of the shape that
            :meth:`Distiller.levels_of` announces, with a gradient.
    """
    name = type(distiller).__name__
    if not isinstance(values, dict):
        raise UserError(
            f"{name}.forward returned {_kind(values)}: give a dict from term to tensor, of "
            f"{_names(wanted)}"
        )
    if set(values) != set(wanted):
        raise UserError(
            f"{name}.forward returned the terms {_names(values)}, wanted are {_names(wanted)}: "
            "give exactly those that self.wants(term) tells, in small letters as in reads"
        )
    for term, value in values.items():
        _check_value(f"{name}.forward, term '{term}'", value, distiller.levels_of(term))


def _check_value(what: str, value: Any, levels: int) -> None:
    if not isinstance(value, Tensor):
        raise UserError(f"{what} returned {_kind(value)}: give a tensor, torch.stack of a list")
    shape: Tuple[int, ...] = (levels,) if levels else ()
    if tuple(value.shape) != shape:
        expected = f"{shape}, one value per level" if levels else "(), a scalar"
        raise UserError(
            f"{what} returned the shape {tuple(value.shape)}, expected {expected}: give that, or "
            "change num_levels of __init__ (levels_of, of one term), 0 for a scalar"
        )
    if torch.is_grad_enabled() and not value.requires_grad:
        raise UserError(
            f"{what} returned a loss without gradient: take it from the student without detach or "
            "no_grad, from a part that is trained"
        )


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _names(terms: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(map(str, terms)))) or "none"

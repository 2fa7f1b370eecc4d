"""Copying weights from the teacher to the student."""

import torch
from torch import nn

from d2kd.errors import UserError


@torch.no_grad()
def copy_weights(student: nn.Module, teacher: nn.Module, key: str) -> None:
    """Fills a part of the student with the same part of the teacher. Both go their own ways after.

    Args:
        student, teacher: modules with the same names and shapes.
        key: config key that asks for it, for messages.

    Raises:
        UserError: if a name or a shape differs.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name in {**ours, **theirs}:
        shapes = [tuple(x[name].shape) if name in x else None for x in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{key} copies weights of the teacher, but '{name}' has shape {shapes[0]} in the "
                f"student and {shapes[1]} in the teacher: take the same head, or set {key} to False"
            )
    student.load_state_dict(theirs)

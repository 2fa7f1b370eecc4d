"""What the methods of a model look at, kept from its training forwards."""

import contextlib
from typing import Callable, Dict, Iterator

import torch
from torch import Tensor

from .teacher_student import TeacherStudent

Maps = Dict[str, Tensor]  # (N, h, w) by the name of a level or stage


@contextlib.contextmanager
def kept_maps(model: TeacherStudent) -> Iterator[Dict[str, Maps]]:
    """Keeps the maps of every method, see :meth:`~d2kd.methods.Distiller.maps`, of the last forward
    within, by what they are, such as "FRS: the teacher's score"."""
    kept: Dict[str, Maps] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(distiller, views, _):
            with torch.no_grad():
                for title, maps in distiller.maps(*views).items():
                    kept[f"{name}: {title}"] = {k: x.float().cpu() for k, x in maps.items()}

        return hook

    handles = [d.register_forward_hook(keep(name)) for name, d in model.distillers.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()

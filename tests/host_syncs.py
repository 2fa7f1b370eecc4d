"""Where code makes the host wait for the device, found without one: what would wait on a GPU shows
on a CPU as an operation whose result the host reads, or whose shape depends on values."""

import contextlib
import os
import sys
from typing import List

import detectron2
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import d2kd

OURS, DETECTRON2 = (os.path.dirname(m.__file__) + os.sep for m in (d2kd, detectron2))
# Runs on a CPU alone
ON_A_CPU = f"{OURS}layers{os.sep}roi_align.py"

aten = torch.ops.aten
# Their result is a number of the host's, or as long as the values of their input say
_WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.histc,
    torch.ops.torchvision.nms,
}
# Only with masks among their indices
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# What copies to the host does not show as an operation on a CPU, nor does what copies from there.
_COPIES = ("tolist", "cpu", "numpy")


def _blamed() -> str:
    """The innermost line of d2kd that is running; "" if Detectron2 runs on its behalf, or if the
    line never runs on a GPU."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(DETECTRON2) or path == ON_A_CPU:
            return ""
        if path.startswith(OURS):
            return f"d2kd/{path[len(OURS) :]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class HostSyncs(TorchDispatchMode):
    """Inside of this context, lines of d2kd that would make the host wait for a GPU are noted.
    Those of Detectron2's own functions are not, nor those of modules that are left out.

    Attributes:
        found: "file:line: operation", in order.
    """

    def __init__(self, left_out: torch.nn.Module):
        """
        Args:
            left_out: nothing is noted while it runs.
        """
        super().__init__()
        self.found: List[str] = []
        self._left_out = left_out
        self._inside = False
        self._exits = contextlib.ExitStack()

    def _note(self, what: str) -> None:
        where = "" if self._inside else _blamed()
        if where:
            self.found.append(f"{where}: {what}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if (
            packet in _WAITING
            or (packet in _INDEXING and any(_is_mask(i) for i in args[1]))
            or (packet is aten.repeat_interleave and kwargs.get("output_size") is None)
        ):
            self._note(str(packet))
        return func(*args, **kwargs)

    def __enter__(self):
        for name in _COPIES:
            self._patch(torch.Tensor, name, lambda args, kwargs: True)
        # From pageable memory, which the host waits for
        self._patch(torch, "tensor", lambda args, kwargs: kwargs.get("device") is not None)
        self._exits.callback(self._left_out.register_forward_pre_hook(self._switch(True)).remove)
        self._exits.callback(self._left_out.register_forward_hook(self._switch(False)).remove)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._exits.close()

    def _switch(self, inside: bool):
        def hook(*_):
            self._inside = inside

        return hook

    def _patch(self, owner, name: str, waits) -> None:
        original = getattr(owner, name)

        def noting(*args, **kwargs):
            if waits(args, kwargs):
                self._note(name)
            return original(*args, **kwargs)

        setattr(owner, name, noting)
        self._exits.callback(setattr, owner, name, original)


def _is_mask(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)

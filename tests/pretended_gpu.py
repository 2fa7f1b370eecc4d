"""A GPU that is not there: tensors on a device of their own, which the CPU computes.

What mixes tensors of both devices fails as it does on a GPU, so that code which forgot to bring
something over is found on machines that have none. The numbers are the CPU's.
"""

import contextlib
import functools
from typing import Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

# Absent in older versions of torch
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
NAME = "pretended"

aten = torch.ops.aten
_COPIES = {aten._to_copy, aten.copy_}
# Their indices may be anywhere
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# They take no numbers of the CPU among their tensors
_JOINING = {aten.cat, aten.stack}


class MixedDevices(RuntimeError):
    """An operation on tensors of the CPU and of the pretended GPU."""


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU.

    Attributes:
        held: its values, on the CPU.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __repr__(self, **_):
        return f"OnGPU({self.held!r})"

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _on_cpu(x):
    return x.held if isinstance(x, OnGPU) else x


def _run(func, args, kwargs):
    """An operation on what the tensors hold; its results are on the GPU where its inputs are, or
    where it is told to put them."""
    kind = func.overloadpacket
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = [x for x in tensors if isinstance(x, OnGPU)]
    target = kwargs.get("device")
    if target is None:
        _check(func, kind, tensors, bool(on_gpu))
        to_gpu = bool(on_gpu) and not (kind is aten.copy_ and not isinstance(args[0], OnGPU))
    else:
        to_gpu = torch.device(target).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(_on_cpu, (args, kwargs))
    results = func(*args, **kwargs)
    if not to_gpu:
        return results
    wrapped = {id(x.held): x for x in on_gpu}  # what is changed in place stays the same tensor

    def placed(x: torch.Tensor) -> OnGPU:
        return wrapped[id(x)] if id(x) in wrapped else OnGPU(x)

    return tree_map_only(torch.Tensor, placed, results)


def _check(func, kind, tensors, on_gpu: bool) -> None:
    if not on_gpu or kind in _COPIES:
        return
    elsewhere = [x for x in tensors if not isinstance(x, OnGPU)]
    if kind in _INDEXING:
        elsewhere = [x for x in elsewhere if x.is_floating_point()]
    if kind not in _JOINING:
        elsewhere = [x for x in elsewhere if x.dim()]
    if elsewhere:
        raise MixedDevices(f"{func}: one tensor is on the GPU, another one on the CPU")


class _Operations(TorchDispatchMode):
    """Operations without a tensor of the GPU, which may put one there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Transfers(TorchFunctionMode):
    """What torch does not show as an operation: tensors from the host's numbers, and back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if not args or not isinstance(args[0], OnGPU):
            return func(*args, **kwargs)
        tensor, *rest = args
        if func is torch.Tensor.new_tensor:
            made = torch.tensor(*rest, dtype=kwargs.get("dtype", tensor.dtype))
            return made.to(kwargs.get("device", tensor.device))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
            rest[0] = tuple(_uploaded(i, tensor.device) for i in index)
        if func is torch.Tensor.tolist:
            tensor = tensor.cpu()
        if func is torch.Tensor.numpy:
            raise TypeError("can't convert a tensor of the GPU to numpy")
        if func is torch.Tensor.unsqueeze_:  # a shape cannot be changed in place here
            func = torch.Tensor.unsqueeze
        return func(tensor, *rest, **kwargs)


def _uploaded(index, device: torch.device):
    return torch.tensor(index).to(device) if isinstance(index, list) else index


@functools.cache
def _register() -> None:
    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return []

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())


@contextlib.contextmanager
def pretended_gpu() -> Iterator[str]:
    """Inside, the device is there; its name comes back. It stays known to torch for as long as the
    process lives, which is why tests start one for it."""
    _register()
    with _Transfers(), _Operations():
        yield NAME

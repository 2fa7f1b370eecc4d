"""Frozen layers that pass the gradient on to their input, in less memory.

torch's convolution keeps its input, which only the gradient of its weights needs. ReLU keeps a
whole map to know where the gradient passes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, *options) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.options = options
        return F.conv2d(x, weight, bias, 1, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        weight = ctx.saved_tensors[0].to(grad.dtype)
        padding, dilation, groups = ctx.options
        grad = F.conv_transpose2d(grad, weight, None, 1, padding, 0, groups, dilation)
        return grad, None, None, None, None, None


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.relu()
        ctx.save_for_backward(out <= 0)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return grad.masked_fill(ctx.saved_tensors[0], 0)  # also an infinite one


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    if weight.requires_grad or stride not in (1, (1, 1)) or isinstance(padding, str):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _Conv2d.apply(x, weight, bias, padding, dilation, groups)


def _relu(x, inplace=False) -> Tensor:
    return _ReLU.apply(x)


class FrozenLayers(TorchFunctionMode):
    """Inside of this context, layers that are not trained need less memory for the backward pass:
    a convolution does not keep its input, which only the gradient of its weights would read, and a
    ReLU keeps one byte per element. Values and gradients are the same; gradients of gradients
    cannot be had.
    """

    _INSTEAD = {F.conv2d: _conv2d, F.relu: _relu}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self._INSTEAD.get(func, func)(*args, **(kwargs or {}))

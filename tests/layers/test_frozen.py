"""Frozen layers with less memory: the same values and gradients."""

import weakref

import pytest
import torch
from torch import nn

from d2kd.layers import FrozenLayers

CONVS = {
    "3x3": {"padding": 1},
    "grouped": {"groups": 2},
    "dilated": {"padding": (0, 2), "dilation": 2, "bias": False},
    "strided": {"stride": 2, "padding": 1},
    "same": {"padding": "same"},
}


def layers(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, **options), nn.GroupNorm(2, 6), nn.ReLU()).double()


@pytest.mark.parametrize("conv", CONVS)
def test_values_and_gradients_are_those_of_the_plain_layers(conv):
    net = layers(**CONVS[conv]).requires_grad_(False)
    x = torch.randn(2, 4, 9, 8, dtype=torch.double, requires_grad=True)
    plain = net(x)
    with FrozenLayers():
        frugal = net(x)
    assert torch.equal(frugal, plain) and (plain == 0).any()
    cotangent = torch.randn_like(plain)
    ours, expected = (torch.autograd.grad(y, x, cotangent)[0] for y in (frugal, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_closed_relu_stops_an_infinite_gradient():
    """As torch's: in mixed precision a scaled gradient may overflow where nothing passes."""
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    with FrozenLayers():
        y = torch.nn.functional.relu(x)
    assert torch.autograd.grad(y, x, torch.tensor([float("inf"), 1.0]))[0].tolist() == [0, 1]


def test_trained_layers_keep_their_gradient():
    net = layers()
    x = torch.randn(2, 4, 9, 8, dtype=torch.double)
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    with FrozenLayers():
        ours = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_mixed_precision(kind):
    net = layers(padding=1).float().requires_grad_(False)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    with torch.autocast("cpu", kind):
        plain = net[0](x)
        with FrozenLayers():
            frugal = net[0](x)
    assert frugal.dtype == plain.dtype == kind and torch.equal(frugal, plain)
    ours, expected = (torch.autograd.grad(y.float().square().sum(), x)[0] for y in (frugal, plain))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


def test_a_convolution_keeps_no_input():
    net = layers().requires_grad_(False)[0]

    def input_survives():
        x = 2 * torch.randn(2, 4, 9, 8, dtype=torch.double, requires_grad=True)
        ref, y = weakref.ref(x), net(x)
        del x
        return ref() is not None and y.requires_grad

    with FrozenLayers():
        frugal = input_survives()
    assert input_survives() and not frugal

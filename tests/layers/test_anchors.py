"""Anchors stand in Detectron2's order: row, column, anchor."""

import pytest
import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K

from d2kd.layers import flatten_anchors, flatten_scalars, highest_logits

SIZES = [(4, 6), (2, 3), (1, 1)]


def maps(channels, dtype=torch.float32):
    """L maps (2, channels, h, w) in which every number is another."""
    shapes = [(2, channels, *size) for size in SIZES]
    return [torch.arange(torch.Size(s).numel()).reshape(s).to(dtype) for s in shapes]


@pytest.mark.parametrize("num_anchors", [1, 3])
def test_flattening_is_detectron2s(num_anchors):
    levels = maps(num_anchors * 5)
    flat = flatten_anchors(levels, num_anchors)
    assert [x.shape for x in flat] == [(2, h * w * num_anchors, 5) for h, w in SIZES]
    assert all(torch.equal(x, permute_to_N_HWA_K(y, 5)) for x, y in zip(flat, levels))


def test_order_written_out():
    (level,) = flatten_anchors([torch.arange(2 * 3 * 2 * 2).reshape(1, 6, 2, 2)], num_anchors=2)
    # Channel = anchor * 3 + number, and 4 cells to a channel
    rows = [[(a * 3 + d) * 4 + cell for d in range(3)] for cell in range(4) for a in range(2)]
    assert level[0].tolist() == rows


def test_scalars_stand_in_the_order_of_the_vectors():
    levels = maps(3)
    flat = flatten_scalars(levels)
    assert [x.shape for x in flat] == [(2, h * w * 3) for h, w in SIZES]
    expected = flatten_anchors(levels, num_anchors=3)
    assert all(torch.equal(x, y[..., 0]) for x, y in zip(flat, expected))


@pytest.mark.parametrize("num_anchors", [1, 3])
def test_highest_logit_of_every_anchor(num_anchors):
    torch.manual_seed(0)
    logits = [torch.randn(2, num_anchors * 5, *size, requires_grad=True) for size in SIZES]
    highest = highest_logits(logits, num_anchors)
    for ours, expected in zip(highest, flatten_anchors(logits, num_anchors)):
        assert torch.equal(ours, expected.amax(dim=2)) and not ours.requires_grad


def test_highest_logits_of_half_precision_are_float32():
    (highest,) = highest_logits([torch.full((1, 4, 2, 2), 3.0, dtype=torch.bfloat16)], 2)
    assert highest.dtype == torch.float32 and torch.equal(highest, torch.full((1, 8), 3.0))

"""Anchors stand in Detectron2's order: row, column, anchor."""

import pytest
import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K

from d2kd.layers import flatten_scalars, highest_logits

SIZES = [(4, 6), (2, 3), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_scalars_stand_in_the_order_of_the_vectors(size):
    level = torch.randn(2, 3, *size)
    flat = flatten_scalars(level)
    assert flat.shape == (2, size[0] * size[1] * 3)
    assert torch.equal(flat, permute_to_N_HWA_K(level, 1)[..., 0])


def test_order_written_out():
    flat = flatten_scalars(torch.arange(3 * 2 * 2).reshape(1, 3, 2, 2))
    assert flat[0].tolist() == [a * 4 + cell for cell in range(4) for a in range(3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_anchors", [1, 3])
def test_highest_logit_of_every_anchor(num_anchors, size):
    torch.manual_seed(0)
    logits = torch.randn(2, num_anchors * 5, *size, requires_grad=True)
    highest = highest_logits(logits, num_anchors)
    assert torch.equal(highest, permute_to_N_HWA_K(logits, 5).amax(dim=2))
    assert not highest.requires_grad


def test_highest_logits_of_half_precision_are_float32():
    highest = highest_logits(torch.full((1, 4, 2, 2), 3.0, dtype=torch.bfloat16), 2)
    assert highest.dtype == torch.float32 and torch.equal(highest, torch.full((1, 8), 3.0))

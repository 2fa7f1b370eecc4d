"""RoIAlign as a sparse product is Detectron2's, by value and by gradient."""

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from d2kd.layers import SparseAlign

STRIDES = [4, 16]
IMAGE = (64, 96)
BOXES = {
    "ordinary": [[4.0, 6, 40, 50], [10, 2, 90, 60], [30, 30, 42, 44]],
    "whole cells": [[0, 0, 96, 64], [4, 8, 32, 36], [6, 6, 34, 62], [16, 16, 48, 48]],
    "tiny": [[20, 20, 20.5, 20.5], [5, 5, 6, 60], [95, 63, 96, 64]],
    "across the border": [[-20, -9, 30, 40], [80, 50, 130, 90], [-200, -100, 300, 200]],
    "outside": [[300, 200, 350, 260], [-90, -90, -20, -10], [96, 64, 120, 80]],
    "without area": [[9, 9, 9, 9], [5, 5, 5, 40], [5, 40, 30, 40], [40, 40, 30, 5]],
}
BOXES["all of them"] = sum(BOXES.values(), [])
every_box = pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)


def maps_of(dtype=torch.float64, order=torch.contiguous_format):
    """Levels of two images, with 3 and with as many channels."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3, *(side // stride for side in IMAGE)) for stride in STRIDES]
    maps = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return [x.contiguous(memory_format=order).requires_grad_() for x in maps]


def rois_of(boxes):
    """(R, 5), the boxes in both images by turns."""
    boxes = torch.tensor(boxes).view(-1, 4)
    return torch.cat([torch.arange(len(boxes))[:, None] % 2, boxes], dim=1)


def reference(maps, rois, resolution):
    return torch.stack([ROIAlign(resolution, 1 / s, 0)(x, rois) for x, s in zip(maps, STRIDES)])


def assert_same(maps, rois, resolution=(7, 7), **tolerance):
    got = SparseAlign(maps, STRIDES, resolution)(rois)
    wanted = reference(maps, rois, resolution)
    torch.testing.assert_close(got, wanted, **tolerance)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(wanted)
    gradients = [torch.autograd.grad((x * weights).sum(), maps) for x in (got, wanted)]
    torch.testing.assert_close(*gradients, **tolerance)


@every_box
@pytest.mark.parametrize("resolution", [(7, 7), (1, 1), (14, 5)])
def test_values_and_gradients(boxes, resolution):
    assert_same(maps_of(), rois_of(boxes), resolution)


@every_box
def test_float32(boxes):
    """As far as sums in another order can agree."""
    assert_same(maps_of(torch.float32), rois_of(boxes), rtol=1e-5, atol=1e-5)


def test_channels_last_maps():
    maps = maps_of(order=torch.channels_last)
    assert_same(maps, rois_of(BOXES["all of them"]))


@pytest.mark.parametrize("seed", range(5))
def test_random_boxes(seed):
    """Of all sizes, from a hundredth of a cell to twice the image."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(200, 2, generator=generator) * torch.tensor(IMAGE[::-1])
    half = 10 ** (torch.rand(200, 2, generator=generator) * 4 - 2)
    assert_same(maps_of(), rois_of(torch.cat([centre - half, centre + half], dim=1).tolist()))


def test_is_what_the_poolers_of_detectors_do():
    maps = maps_of(torch.float32)
    boxes = torch.tensor(BOXES["ordinary"])
    ours = SparseAlign(maps, STRIDES, (7, 7))(torch.cat([torch.zeros(3, 1), boxes], dim=1))
    for x, stride, got in zip(maps, STRIDES, ours):
        pooler = ROIPooler(7, [1 / stride], sampling_ratio=0, pooler_type="ROIAlignV2")
        torch.testing.assert_close(got, pooler([x], [Boxes(boxes), Boxes(boxes[:0])]))


def test_no_regions():
    assert_same(maps_of(), rois_of([]))
    assert SparseAlign(maps_of(), STRIDES, (7, 7))(rois_of([])).shape == (2, 0, 3, 7, 7)


def test_boxes_with_one_side_below_zero_are_zeros():
    """torchvision cannot pool them on a CPU."""
    assert not SparseAlign(maps_of(), STRIDES, (7, 7))(
        rois_of([[9, 5, 4, 40], [5, 9, 40, 4]])
    ).any()


def test_boxes_of_no_numbers_are_zeros():
    """A run that diverges ends where its loss is looked at, not here."""
    nan, infinite = float("nan"), float("inf")
    boxes = [[nan] * 4, [-infinite, 3, infinite, 9], [infinite] * 4]
    assert not SparseAlign(maps_of(), STRIDES, (7, 7))(rois_of(boxes)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_float32(dtype):
    """Boxes are rounded as Detectron2 does it for maps in half precision, pooled values are not."""
    maps, rois = maps_of(dtype), rois_of(BOXES["all of them"])
    with torch.autocast("cpu", torch.bfloat16):
        got = SparseAlign(maps, STRIDES, (7, 7))(rois)
    wanted = reference([x.float() for x in maps], rois.to(dtype).float(), (7, 7))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert all(x.dtype == dtype for x in torch.autograd.grad(got.sum(), maps))


def test_maps_without_gradient():
    maps = [x.detach() for x in maps_of()]
    assert not SparseAlign(maps, STRIDES, (7, 7))(rois_of(BOXES["ordinary"])).requires_grad

"""Sets of regions, and some of them."""

import pytest
import torch
from detectron2.structures import Boxes
from host_syncs import HostSyncs
from torch import nn

from d2kd.views import RegionSet

KEPT = [[True, False, True], [], [False, False], [False, True, False, True]]
ROWS = [0, 2, 6, 8]  # of those that are true


def regions_of(with_anchors):
    counts = [len(kept) for kept in KEPT]
    numbers = torch.arange(float(sum(counts)))
    boxes = [Boxes(x[:, None].expand(-1, 4)) for x in numbers.split(counts)]
    classes = list((10 + numbers).split(counts))
    if not with_anchors:
        return RegionSet(boxes, classes)
    return RegionSet(boxes, classes, list((20 + numbers).split(counts)), valid=numbers % 4 == 0)


@pytest.mark.parametrize("with_anchors", [False, True])
def test_some_regions_know_their_places(with_anchors):
    regions = regions_of(with_anchors)
    some = regions.where([torch.tensor(kept, dtype=torch.bool) for kept in KEPT])
    assert some.parent is regions and some.rows.tolist() == ROWS
    assert [len(b) for b in some.boxes] == [len(c) for c in some.classes] == [2, 0, 0, 2]
    assert Boxes.cat(some.boxes).tensor[:, 0].tolist() == ROWS
    assert torch.cat(some.classes).tolist() == [10 + row for row in ROWS]
    if with_anchors:
        assert torch.cat(some.anchors).tolist() == [20 + row for row in ROWS]
        assert some.valid.tolist() == [row % 4 == 0 for row in ROWS]


def test_the_host_waits_once_per_image():
    with HostSyncs(nn.Identity()) as syncs:
        regions_of(True).where([torch.tensor(kept, dtype=torch.bool) for kept in KEPT])
    assert len(syncs.found) == len(KEPT)


def test_a_mean_over_no_valid_region_is_zero():
    boxes, classes = [Boxes(torch.zeros(2, 4))], [torch.zeros(2)]
    regions = RegionSet(boxes, classes, valid=torch.zeros(2, dtype=torch.bool))
    assert regions.mean(torch.ones(2)) == 0

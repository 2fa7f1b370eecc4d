"""What a teacher's regions are pooled from, and what is sampled with them."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes
from detectron2.utils.events import EventStorage
from test_roi_views import (
    POOLED,
    PREDICTIONS,
    inputs_with_masks_and_keypoints,
    student_view,
    targets_of,
    teach,
    teacher_of,
    two_stage,
)
from toys import batch

from d2kd.views import Proposals, build_family


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_keep_their_places_on_maps_in_half_precision(dtype):
    head = build_family(two_stage("faster")).box_head
    maps = {f"p{k}": torch.rand(1, 32, 512 >> k, 512 >> k).to(dtype) for k in range(2, 6)}
    boxes = [Boxes(torch.tensor([[301.3, 203.7, 431.1, 299.6], [100.3, 3.7, 131.1, 99.6]]))]
    found = head.run(maps, boxes, POOLED).pooled
    expected = head.run({name: x.float() for name, x in maps.items()}, boxes, POOLED).pooled
    assert torch.equal(found, expected)


def test_masks_are_left_alone_when_a_teacher_samples(monkeypatch):
    inputs = inputs_with_masks_and_keypoints()
    _, view = student_view(two_stage("mask"), inputs)
    frozen = teacher_of(view, "mask")
    monkeypatch.setattr(BitMasks, "__getitem__", lambda *_: pytest.fail("masks were gathered"))
    with EventStorage():
        regions = teach(frozen, view, inputs).proposals(Proposals())
    assert len(Boxes.cat(regions.boxes)) > 0 and targets_of(inputs)[0].has("gt_masks")


def test_the_box_head_runs_in_the_precision_of_the_teacher():
    _, view = student_view(two_stage("faster"), batch())
    frozen = teacher_of(view)
    frozen.precision_name = "bfloat16"
    with EventStorage():
        taught = teach(frozen, view, batch())
    regions = view.proposals(Proposals())
    assert taught.regions(regions, PREDICTIONS).logits.dtype == torch.bfloat16

"""The overlap of pairs of boxes, and its gradient."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from d2kd.layers import iou_log_loss, paired_iou


def test_the_gradient_of_an_overlap_does_not_make_the_host_wait():
    """Not even of boxes that do not meet: a number that backward reads is waited for on a GPU."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]], requires_grad=True)
    targets = torch.tensor([[5.0, 5, 20, 20], [30, 30, 40, 40]])
    iou, giou = paired_iou(boxes, targets)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        (iou.sum() + giou.sum()).backward()
    assert "aten::item" not in {event.key for event in found.key_averages()}
    assert iou.tolist() == pytest.approx([25 / (100 + 225 - 25), 0])
    assert boxes.grad.abs().sum() > 0


def test_losses_of_boxes_without_area_are_finite():
    box = torch.full((1, 4), 5.0, requires_grad=True)
    iou, giou = paired_iou(box, box.detach())
    loss = iou_log_loss(iou) + 1 - giou
    loss.backward()
    assert loss.isfinite() and box.grad.isfinite().all()

"""FCOS: weights interchange with Detectron2's, and the FCOS of the papers equals the original."""

import pytest
import torch
from dense_cases import (
    LEVELS,
    all_levels,
    array,
    check_end_to_end,
    original_detector,
    original_ground_truth,
    pyramid_features,
    tiny_config,
)
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import sigmoid_focal_loss
from toys import batch, step

from d2kd.distillation import build_detector
from d2kd.layers import centerness_targets
from d2kd.modeling.meta_arch import FCOS
from d2kd.modeling.meta_arch.assign import assign_fcos


def detectron2s_own(detector):
    """Detectron2's FCOS on copies of the same parts, as its Python configs make it."""
    shapes = [detector.backbone.output_shape()[name] for name in detector.head_in_features]
    head = fcos.FCOSHead(input_shape=shapes, num_classes=6, conv_dims=[64], norm="GN")
    return fcos.FCOS(
        backbone=build_detector(tiny_config("FCOS")).backbone,
        head=head,
        num_classes=6,
        test_score_thresh=0.05,
        pixel_mean=[127.5] * 3,
        pixel_std=[58.0] * 3,
    )


def test_is_detectron2s_fcos_weights_losses_and_all():
    ours = build_detector(tiny_config("FCOS"))
    theirs = detectron2s_own(ours)
    theirs.load_state_dict(ours.state_dict())
    inputs = batch()
    losses, expected = step(ours, inputs), step(theirs, inputs)
    assert all(torch.allclose(losses[k], expected[k], rtol=1e-6) for k in expected)
    with torch.no_grad():
        found, wanted = (m.eval()(inputs)[0]["instances"] for m in (ours, theirs))
    assert torch.equal(found.scores, wanted.scores)


def test_an_image_without_objects_is_background():
    detector = build_detector(tiny_config("FCOS"))
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0]]))]
    gt = Instances((8, 16), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    labels, _ = detector.label_anchors(anchors, [gt])
    assert labels[0].tolist() == [6, 6]


def test_paper_fcos_is_an_fcos():
    assert isinstance(build_detector(tiny_config("PaperFCOS")), FCOS)


def test_paper_assignment_equals_the_original():
    detector, gt = original_detector("fcos"), original_ground_truth()
    anchors = detector.anchor_generator(pyramid_features())
    labels, boxes = map(torch.stack, detector.label_anchors(anchors, gt))
    expected = torch.cat([array(f"assign/fcos_labels_l{i}").view(2, -1) for i in LEVELS], dim=1)
    assert torch.equal(labels, expected)
    positive = labels < 5
    assert positive.sum() == array("assign/fcos_num_pos")

    target = centerness_targets(Boxes.cat(anchors).get_centers(), boxes, positive)
    stored = all_levels("assign/fcos_targets", dim=0)[all_levels("assign/fcos_labels", dim=0) < 5]
    # stored level by level, ours image by image
    starts = [0, *torch.tensor([len(x) for x in anchors]).cumsum(0).tolist()]
    by_level = [slice(a, b) for a, b in zip(starts, starts[1:])]
    target = torch.cat([target[:, s][positive[:, s]] for s in by_level])
    assert torch.allclose(target, array("assign/fcos_centerness_targets_pos"), atol=1e-6)
    coding = detector.box2box_transform
    ltrb = torch.stack([coding.get_deltas(Boxes.cat(anchors).tensor, b) for b in boxes])
    assert torch.allclose(torch.cat([ltrb[:, s][positive[:, s]] for s in by_level]), stored)


@pytest.mark.parametrize("size, level", [(31.0, 0), (64.0, 0), (66.0, 1), (128.0, 1), (140.0, 2)])
def test_paper_ranges_are_closed(size, level):
    # one point per level at (100, 100); the box reaches `size` to its right
    points = [
        Boxes(torch.tensor([[100.0 - s / 2, 100.0 - s / 2, 100.0 + s / 2, 100.0 + s / 2]]))
        for s in (8, 16, 32)
    ]
    box = torch.tensor([[90.0, 90.0, 100.0 + size, 110.0]])
    expected = [1, 1, 1]
    expected[level] = 0
    if size in (64.0, 128.0):  # belongs to both ranges that it ends and begins
        expected[level + 1] = 0
    assert assign_fcos(points, box).tolist() == expected


def test_paper_takes_the_smallest_box():
    point = [Boxes(torch.tensor([[46.0, 46.0, 54.0, 54.0]]))]
    boxes = torch.tensor([[10.0, 10.0, 90.0, 90.0], [40.0, 40.0, 60.0, 60.0], [60.0, 0, 70.0, 9.0]])
    assert assign_fcos(point, boxes).tolist() == [1]


def test_paper_losses_by_hand():
    detector, gt = original_detector("fcos"), original_ground_truth()
    features = pyramid_features()
    torch.manual_seed(2)
    logits, deltas, centerness = predictions = [
        [torch.randn(2, channels, *x.shape[-2:]) for x in features] for channels in (5, 4, 1)
    ]
    deltas[:] = [(x + 3).exp() for x in deltas]  # distances in pixels
    images = ImageList(torch.zeros(2, 3, 128, 192), [x.image_size for x in gt])
    losses = detector.forward_training(images, features, predictions, gt)

    labels = all_levels("assign/fcos_labels", dim=0)
    positive = labels < 5
    ltrb = all_levels("assign/fcos_targets", dim=0)[positive]
    quality = array("assign/fcos_centerness_targets_pos")
    logits, deltas, centerness = (
        torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in p]) for p in predictions
    )
    target = torch.nn.functional.one_hot(labels, 6)[:, :5].float()
    cls = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2, reduction="sum")
    deltas, overlap = deltas[positive], torch.minimum(deltas[positive], ltrb)
    overlap, predicted, true = (
        (x[:, 0] + x[:, 2]) * (x[:, 1] + x[:, 3]) for x in (overlap, deltas, ltrb)
    )
    reg = (quality * -(overlap / (predicted + true - overlap)).log()).sum()
    ctr = torch.nn.functional.binary_cross_entropy_with_logits(
        centerness[positive, 0], quality, reduction="sum"
    )
    assert torch.allclose(losses["loss_fcos_cls"], cls / 154, rtol=1e-5)
    assert torch.allclose(losses["loss_fcos_loc"], reg / quality.sum(), rtol=1e-5)
    assert torch.allclose(losses["loss_fcos_ctr"], ctr / 154, rtol=1e-5)


def test_paper_fcos_equals_the_original_end_to_end():
    check_end_to_end("fcos")

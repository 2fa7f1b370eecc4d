"""ATSS: its assignment against the original and against the rule written with loops."""

import torch
from dense_cases import (
    LEVELS,
    all_levels,
    array,
    check_end_to_end,
    original_detector,
    original_ground_truth,
    pyramid_features,
    relative_error,
)
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList
from torch.nn import functional as F

from d2kd.layers import paired_iou
from d2kd.modeling.meta_arch.assign import assign_atss


def test_labels_equal_the_original():
    detector, gt = original_detector("atss"), original_ground_truth()
    anchors = detector.anchor_generator(pyramid_features())
    labels, boxes = map(torch.stack, detector.label_anchors(anchors, gt))
    expected = all_levels("assign/atss_labels")
    valid = all_levels("assign/atss_label_weights") > 0
    assert torch.equal(labels, expected.masked_fill(~valid, -1))
    assert torch.equal(valid, torch.stack([array("assign/valid_img0"), array("assign/valid_img1")]))
    assert torch.equal(boxes, all_levels("assign/atss_bbox_targets"))
    counts = ((labels >= 0) & (labels < 5)).sum(dim=1).clamp(min=1)
    assert counts.sum() == array("assign/atss_avg_factor")


def rule_with_loops(anchors, valid, gt_boxes):
    """Section 3 of the paper, one box, level and candidate after the other."""
    everything = torch.cat(anchors)
    best = [(-1.0, len(gt_boxes))] * len(everything)
    for g, gt in enumerate(gt_boxes):
        candidates, start = [], 0
        for level in anchors:
            usable = [i for i in range(start, start + len(level)) if valid[i]]
            centers = (everything[usable, :2] + everything[usable, 2:]) / 2
            order = (centers - (gt[:2] + gt[2:]) / 2).norm(dim=1).argsort()
            candidates += [usable[i] for i in order[:9]]
            start += len(level)
        iou = paired_iou(everything[candidates], gt.expand(len(candidates), 4))[0]
        for i, value in zip(candidates, iou):
            x, y = (everything[i, :2] + everything[i, 2:]) / 2
            margin = min(x - gt[0], y - gt[1], gt[2] - x, gt[3] - y)
            if value >= iou.mean() + iou.std() and margin > 0.01 and value > best[i][0]:
                best[i] = (value, g)
    return [g for _, g in best]


def test_assignment_follows_the_rule():
    torch.manual_seed(0)
    anchors = [x.tensor for x in original_detector("atss").anchor_generator(pyramid_features())]
    for height, width in ((128, 192), (64, 96), (32, 32)):
        corner = torch.rand(12, 2) * torch.tensor([width, height]) * 0.8 - 5
        boxes = torch.cat([corner, corner + 3 + torch.rand(12, 2) ** 2 * 100], dim=1)
        center = torch.cat([(a[:, :2] + a[:, 2:]) / 2 for a in anchors])
        valid = (center[:, 0] < width) & (center[:, 1] < height)
        index = assign_atss(anchors, valid, boxes)
        assert index.tolist() == rule_with_loops(anchors, valid, boxes)
        assert (index[~valid] == 12).all() and (index < 12).any()


def test_no_boxes_no_positives():
    anchors = [x.tensor for x in original_detector("atss").anchor_generator(pyramid_features())]
    index = assign_atss(anchors, torch.ones(512, dtype=torch.bool), torch.zeros(0, 4))
    assert (index == 0).all() and len(index) == 512


def test_losses_by_hand():
    detector, gt = original_detector("atss"), original_ground_truth()
    features = pyramid_features()
    torch.manual_seed(2)
    predictions = [
        [torch.randn(2, channels, *x.shape[-2:]) for x in features] for channels in (5, 4, 1)
    ]
    images = ImageList(torch.zeros(2, 3, 128, 192), [x.image_size for x in gt])
    losses = detector.forward_training(images, features, predictions, gt)

    anchors = Boxes.cat(detector.anchor_generator(features)).tensor
    labels, boxes = detector.label_anchors(detector.anchor_generator(features), gt)
    flat = [torch.cat([x.flatten(2).transpose(1, 2) for x in p], dim=1) for p in predictions]
    cls, reg, ctr, weights = 0.0, 0.0, 0.0, 0.0
    for label, box, logits, deltas, centerness in zip(labels, boxes, *flat):
        kept, positive = label >= 0, (label >= 0) & (label < 5)
        target = F.one_hot(label[kept], 6)[:, :5].float()
        p = logits[kept].sigmoid()
        focal = 0.25 * target * (1 - p) ** 2 * -p.log()
        cls += (focal - 0.75 * (1 - target) * p**2 * (1 - p).log()).sum()
        center = (anchors[positive, :2] + anchors[positive, 2:]) / 2
        ltrb = torch.cat([center - box[positive, :2], box[positive, 2:] - center], dim=1)
        ratio = [
            torch.min(a, b) / torch.max(a, b)
            for a, b in ((ltrb[:, 0], ltrb[:, 2]), (ltrb[:, 1], ltrb[:, 3]))
        ]
        quality = (ratio[0] * ratio[1]).sqrt()
        decoded = detector.box2box_transform.apply_deltas(deltas[positive], anchors[positive])
        reg += (quality * (1 - paired_iou(decoded, box[positive])[1])).sum()
        ctr += F.binary_cross_entropy(centerness[positive, 0].sigmoid(), quality, reduction="sum")
        weights += quality.sum()
    assert torch.allclose(losses["loss_cls"], cls / 34, rtol=1e-5)
    assert torch.allclose(losses["loss_box_reg"], 2 * reg / weights.clamp(min=1), rtol=1e-5)
    assert torch.allclose(losses["loss_centerness"], ctr / 34, rtol=1e-5)


def test_padding_gets_no_gradient():
    detector, gt = original_detector("atss"), original_ground_truth()
    features = pyramid_features()
    predictions = [
        [torch.randn(2, channels, *x.shape[-2:], requires_grad=True) for x in features]
        for channels in (5, 4, 1)
    ]
    images = ImageList(torch.zeros(2, 3, 128, 192), [x.image_size for x in gt])
    sum(detector.forward_training(images, features, predictions, gt).values()).backward()
    grad = predictions[0][0].grad[1]  # the second image is 96 x 160, at stride 8
    assert grad[:, :12, :20].abs().min() > 0
    assert grad[:, 12:].abs().max() == 0 and grad[:, :, 20:].abs().max() == 0


def test_box_coding_equals_the_original():
    # Row 1 has a height delta of -60, which only the original clamps.
    rows = [0, 2, 3, 4, 5, 6]
    coding = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    anchors, deltas = array("delta/std0112_anchors")[rows], array("delta/std0112_deltas")[rows]
    decoded = coding.apply_deltas(deltas, anchors)
    assert relative_error(decoded, array("delta/std0112_decoded")[rows]) < 1e-6


def test_centerness_only_scales_what_the_class_score_chose():
    detector = original_detector("atss")
    features = pyramid_features()
    predictions = [
        [torch.full((2, channels, *x.shape[-2:]), value) for x in features]
        for channels, value in ((5, -10.0), (4, 0.0), (1, -3.0))
    ]
    predictions[0][1][0, 3, 4, 5] = 2.0
    images = ImageList(torch.zeros(2, 3, 128, 192), [(128, 192)] * 2)
    first, second = detector.forward_inference(images, features, predictions)
    expected = torch.tensor(2.0).sigmoid() * torch.tensor(-3.0).sigmoid()
    assert torch.allclose(first.scores, expected[None]) and first.pred_classes.tolist() == [3]
    # the anchor at (80, 64), 128 px wide, clipped to the image
    assert first.pred_boxes.tensor.tolist() == [[16.0, 0.0, 144.0, 128.0]]
    assert len(second) == 0


def test_equals_the_original_end_to_end():
    check_end_to_end("atss")


def test_levels_are_those_of_the_cases():
    detector = original_detector("atss")
    assert len(detector.anchor_generator(pyramid_features())) == len(LEVELS)

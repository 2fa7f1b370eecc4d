"""Regions of dense students: where they come from, and how they are sampled."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from test_gdetkd_distiller import DENSE, model_of, views_of
from toys import batch

from d2kd.methods.dense_rois import DenseSampling, anchor_scores, dense_rois, vectors_of

every_dense = pytest.mark.parametrize("name", DENSE)
ALL = DenseSampling(pre_nms_topk=10**6, post_nms_topk=10**6, nms_thresh=1.0, rois_per_image=10**6)


def student_view(folder, name, inputs):
    model = model_of(folder, name)
    student, _, targets = views_of(model, inputs)
    return student, targets


def origins(view):
    """(level, y, x, anchor) of every anchor, by loops."""
    return [
        (level, y, x, a)
        for level, maps in enumerate(view.dense.logits)
        for y in range(maps.shape[2])
        for x in range(maps.shape[3])
        for a in range(view.family.dense_head.num_anchors)
    ]


@every_dense
def test_box_vector_and_score_come_from_the_same_place(tmp_path, name):
    view, targets = student_view(tmp_path, name, batch())
    head, dense = view.family.dense_head, view.dense
    proposals = dense_rois(view, targets, DenseSampling(rois_per_image=64))
    places = origins(view)
    tower = dense.tower("cls", head.num_blocks("cls"))
    vectors = vectors_of(tower, [p.anchors for p in proposals], head.num_anchors)
    decoded, scores = dense.decode(dense.deltas), anchor_scores(dense, head.num_anchors)
    scores = torch.cat(scores, dim=1)
    rows = iter(vectors)
    for i, p in enumerate(proposals):
        assert 0 < len(p) <= 64
        for box, anchor in zip(p.proposal_boxes, p.anchors.tolist()):
            level, y, x, a = places[anchor]
            assert torch.equal(next(rows), tower[level][i, :, y, x])
            expected = Boxes(decoded[i, anchor][None].detach().clone())
            expected.clip(targets[i].image_size)
            assert torch.allclose(box, expected.tensor[0])
            logits = dense.logits[level][i].unflatten(0, (head.num_anchors, -1))[a, :, y, x]
            assert scores[i, anchor].item() == pytest.approx(logits.max().sigmoid().item())


@every_dense
def test_logits_are_left_alone_and_nothing_has_a_gradient(tmp_path, name):
    view, targets = student_view(tmp_path, name, batch())
    before = [x.detach().clone() for x in view.dense.logits]
    proposals = dense_rois(view, targets, DenseSampling())
    assert all(torch.equal(a, b) for a, b in zip(before, view.dense.logits))
    assert not any(p.proposal_boxes.tensor.requires_grad for p in proposals)


def synthetic(boxes, scores, levels, num_classes=2):
    """A view of one image whose anchors predict these boxes with these scores."""
    sizes = [levels.count(level) for level in sorted(set(levels))]
    logits = torch.tensor(scores).logit().split(sizes)
    # (1, K, 1, w): the second class is hopeless
    logits = [torch.stack([x, x - 9])[None, :, None] for x in logits]
    decoded = torch.tensor(boxes, dtype=torch.float32)[None]
    dense = SimpleNamespace(
        logits=logits, deltas=[x[:, :1] for x in logits], centerness=None, decode=lambda _: decoded
    )
    family = SimpleNamespace(dense_head=SimpleNamespace(num_anchors=1), num_classes=num_classes)
    return SimpleNamespace(dense=dense, family=family)


def target(boxes, classes=(), size=(100, 100)):
    gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    return Instances(size, gt_boxes=gt_boxes, gt_classes=torch.tensor(classes, dtype=torch.long))


GOOD, NEAR, FAR = [10, 10, 50, 50], [10, 10, 50, 48], [60, 60, 90, 90]


def chosen(view, targets, **options):
    (p,) = dense_rois(view, targets, ALL._replace(**options))
    return dict(zip(p.anchors.tolist(), p.gt_classes.tolist()))


def test_suppression_is_within_levels():
    objects = [target([GOOD], [1])]
    view = synthetic([GOOD, NEAR, FAR], [0.5, 0.9, 0.1], [0, 0, 0])
    assert chosen(view, objects, nms_thresh=0.7, positive_fraction=1.0) == {1: 1, 2: 2}
    view = synthetic([GOOD, NEAR, FAR], [0.5, 0.9, 0.1], [0, 1, 1])
    assert chosen(view, objects, nms_thresh=0.7, positive_fraction=1.0).keys() == {0, 1, 2}


def test_best_per_level_then_best_per_image():
    boxes = [GOOD, FAR, [0, 60, 30, 90], [60, 0, 90, 30]]
    view, objects = synthetic(boxes, [0.2, 0.1, 0.9, 0.8], [0, 0, 1, 1]), [target([])]
    assert chosen(view, objects, pre_nms_topk=1).keys() == {0, 2}
    assert chosen(view, objects, post_nms_topk=3).keys() == {0, 2, 3}


def test_boxes_are_clipped_and_empty_or_wild_ones_dropped():
    nan = float("nan")
    boxes = [[-20, -20, 30, 30], [120, 10, 150, 20], [5, 5, 5, 9], [nan, 0, 9, 9]]
    view = synthetic(boxes, [0.5, 0.9, 0.9, 0.9], [0] * 4)
    (p,) = dense_rois(view, [target([])], ALL)
    assert p.anchors.tolist() == [0]
    assert p.proposal_boxes.tensor.tolist() == [[0, 0, 30, 30]]


def test_none_left():
    view = synthetic([[5, 5, 5, 5]], [0.5], [0])
    for objects in (target([]), target([GOOD], [1])):
        (p,) = dense_rois(view, [objects], ALL)
        assert (
            len(p) == 0 and p.anchors.dtype == torch.long and p.proposal_boxes.tensor.shape[1] == 4
        )


@every_dense
def test_share_of_positives(tmp_path, name):
    view, targets = student_view(tmp_path, name, batch())
    # Objects where boxes are predicted, so that there are positives
    (some, *_) = dense_rois(view, targets, DenseSampling(rois_per_image=20))
    size = targets[0].image_size
    objects = Instances(size, gt_boxes=some.proposal_boxes, gt_classes=torch.arange(len(some)) % 6)
    (p, _) = dense_rois(view, [objects, targets[1]], DenseSampling(rois_per_image=16))
    positive = p.gt_classes < 6
    assert len(p) <= 16 and 0 < positive.sum() <= 4
    iou = pairwise_iou(objects.gt_boxes, p.proposal_boxes)
    assert torch.equal(iou.amax(dim=0) >= 0.5, positive)
    best = iou.argmax(dim=0)
    assert torch.equal(objects.gt_classes[best][positive], p.gt_classes[positive])

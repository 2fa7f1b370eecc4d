"""Regions of dense students: where they come from, and how they are sampled."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances, pairwise_iou
from gdetkd_cases import DENSE, model_of, views_of
from toys import batch

from d2kd.layers import highest_logits
from d2kd.methods.gdetkd import dense_regions
from d2kd.methods.gdetkd.dense_regions import DenseSampling, sample_predicted_boxes, vectors_of
from d2kd.views import Tower
from d2kd.views.families import DensePredictions

every_dense = pytest.mark.parametrize("name", DENSE)
ALL = DenseSampling(pre_nms_topk=10**6, post_nms_topk=10**6, nms_thresh=1.0, rois_per_image=10**6)


def limits(**changed):
    """The defaults of the config, but for some."""
    counts = {"pre_nms_topk": 2000, "post_nms_topk": 1000, "rois_per_image": 512}
    return DenseSampling(**{**counts, **changed})


def sampled(view, targets, sampling=None):
    """The regions that count."""
    regions = sample_predicted_boxes(view, targets, sampling or limits())
    of_images = regions.valid.split([len(b) for b in regions.boxes])
    return regions.where(of_images)


def student_view(folder, name, inputs):
    model = model_of(folder, name)
    student, _, targets = views_of(model, inputs)
    return student, targets


def origins(view):
    """(level, y, x, anchor) of every anchor, by loops."""
    return [
        (level, y, x, a)
        for level, maps in enumerate(view.predictions.logits)
        for y in range(maps.shape[2])
        for x in range(maps.shape[3])
        for a in range(view.family.dense_head.num_anchors)
    ]


@every_dense
def test_box_vector_and_score_come_from_the_same_place(tmp_path, name):
    view, targets = student_view(tmp_path, name, batch())
    head, predictions = view.family.dense_head, view.predictions
    regions = sampled(view, targets, limits(rois_per_image=64))
    places = origins(view)
    tower = view.tower(Tower("cls", head.num_blocks("cls")))
    vectors = vectors_of(tower, regions.anchors, head.num_anchors)
    decoded = view.decode(predictions.deltas)
    highest = [highest_logits(logits, head.num_anchors) for logits in predictions.logits]
    scores = torch.cat(highest, dim=1).sigmoid()
    rows = iter(vectors)
    for i, (boxes, anchors) in enumerate(zip(regions.boxes, regions.anchors)):
        assert 0 < len(boxes) == len(anchors) <= 64
        for box, anchor in zip(boxes, anchors.tolist()):
            level, y, x, a = places[anchor]
            assert torch.equal(next(rows), tower[level][i, :, y, x])
            expected = Boxes(decoded[i, anchor][None].detach().clone())
            expected.clip(targets[i].image_size)
            assert torch.allclose(box, expected.tensor[0])
            logits = predictions.logits[level][i].unflatten(0, (head.num_anchors, -1))[a, :, y, x]
            assert scores[i, anchor].item() == pytest.approx(logits.max().sigmoid().item())
    assert next(rows, None) is None


@every_dense
def test_logits_are_left_alone_and_nothing_has_a_gradient(tmp_path, name):
    view, targets = student_view(tmp_path, name, batch())
    before = [x.detach().clone() for x in view.predictions.logits]
    regions = sampled(view, targets)
    assert all(torch.equal(a, b) for a, b in zip(before, view.predictions.logits))
    assert not any(boxes.tensor.requires_grad for boxes in regions.boxes)


def synthetic(boxes, scores, levels, num_classes=2):
    """A view of one image whose anchors predict these boxes with these scores."""
    sizes = [levels.count(level) for level in sorted(set(levels))]
    logits = torch.tensor(scores).logit().split(sizes)
    # (1, K, 1, w): the second class is hopeless
    logits = [torch.stack([x, x - 9])[None, :, None] for x in logits]
    decoded = torch.tensor(boxes, dtype=torch.float32)[None]
    predictions = DensePredictions(logits, [x[:, :1] for x in logits])
    family = SimpleNamespace(dense_head=SimpleNamespace(num_anchors=1), num_classes=num_classes)
    return SimpleNamespace(predictions=predictions, family=family, decode=lambda _: decoded)


def target(boxes, classes=(), size=(100, 100)):
    gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    return Instances(size, gt_boxes=gt_boxes, gt_classes=torch.tensor(classes, dtype=torch.long))


GOOD, NEAR, FAR = [10, 10, 50, 50], [10, 10, 50, 48], [60, 60, 90, 90]


def chosen(view, targets, **options):
    regions = sampled(view, targets, ALL._replace(**options))
    return dict(zip(regions.anchors[0].tolist(), regions.classes[0].tolist()))


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
    regions = sampled(view, [target([])], ALL)
    assert regions.anchors[0].tolist() == [0]
    assert regions.boxes[0].tensor.tolist() == [[0, 0, 30, 30]]


def test_what_is_not_finite_takes_nothing_from_others():
    nan = float("nan")
    view = synthetic([GOOD, NEAR, [nan, 0, 9, 9]], [0.5, 0.9, 0.1], [0, 0, 0])
    assert chosen(view, [target([])], nms_thresh=0.7).keys() == {1}
    view = synthetic([GOOD, FAR], [0.5, nan], [0, 0])
    assert chosen(view, [target([])], post_nms_topk=1).keys() == {0}


def test_an_overlap_of_the_threshold_is_positive():
    view = synthetic([[0, 0, 40, 40]], [0.5], [0])
    assert chosen(view, [target([[0, 0, 40, 20]], [1])], positive_fraction=1.0) == {0: 1}


def test_none_left():
    view = synthetic([[5, 5, 5, 5]], [0.5], [0])
    for objects in (target([]), target([GOOD], [1])):
        regions = sampled(view, [objects], ALL)
        assert regions.boxes[0].tensor.shape == (0, 4)
        assert all(len(x[0]) == 0 for x in (regions.anchors, regions.classes))
        assert regions.anchors[0].dtype == regions.classes[0].dtype == torch.long


@every_dense
def test_the_number_of_regions_is_known_beforehand(tmp_path, name):
    """Whatever is predicted: shapes tell the host nothing."""
    view, targets = student_view(tmp_path, name, batch())
    few = limits(post_nms_topk=10, rois_per_image=64)
    for sampling, count in ((few, 10), (few._replace(post_nms_topk=100), 64)):
        regions = sample_predicted_boxes(view, targets, sampling)
        assert [len(b) for b in regions.boxes] == [count, count]
        assert [len(c) for c in regions.classes] == [len(a) for a in regions.anchors]
        assert regions.valid.shape == (2 * count,)
        background = torch.cat(regions.classes)[~regions.valid] == view.family.num_classes
        assert background.all()


def test_one_suppression_for_a_batch(tmp_path, monkeypatch):
    """It makes the host wait. What is of another image suppresses nothing."""
    view, targets = student_view(tmp_path, "RetinaNet", batch([(96, 128)] * 2))
    calls = []

    def counted(*args):
        calls.append(args)
        return batched_nms(*args)

    monkeypatch.setattr(dense_regions, "batched_nms", counted)
    few = limits(post_nms_topk=50, rois_per_image=50)
    together = sampled(view, targets, few)
    assert len(calls) == 1
    for i, anchors in enumerate(together.anchors):
        one = SimpleNamespace(
            family=view.family,
            predictions=DensePredictions(
                *[[x[i : i + 1] for x in p] for p in view.predictions[:2]]
            ),
            decode=lambda _, i=i: view.decode(view.predictions.deltas)[i : i + 1],
        )
        alone = sampled(one, targets[i : i + 1], few._replace(positive_fraction=1.0))
        assert len(anchors) > 30 and set(anchors.tolist()) == set(alone.anchors[0].tolist())


@every_dense
def test_share_of_positives(tmp_path, name):
    view, targets = student_view(tmp_path, name, batch())
    # Objects where boxes are predicted, so that there are positives
    some, _ = sampled(view, targets, limits(rois_per_image=20)).boxes
    size = targets[0].image_size
    objects = Instances(size, gt_boxes=some, gt_classes=torch.arange(len(some)) % 6)
    sampling = limits(rois_per_image=16)
    regions = sampled(view, [objects, targets[1]], sampling)
    boxes, classes = regions.boxes[0], regions.classes[0]
    positive = classes < 6
    assert len(boxes) <= 16 and 0 < positive.sum() <= 4
    iou = pairwise_iou(objects.gt_boxes, boxes)
    assert torch.equal(iou.amax(dim=0) >= 0.5, positive)
    best = iou.argmax(dim=0)
    assert torch.equal(objects.gt_classes[best][positive], classes[positive])


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS"])
def test_objects_alone_keep_their_anchors(tmp_path, name):
    view, targets = student_view(tmp_path, name, batch())
    regions = sampled(view, targets, limits(rois_per_image=64))
    marked = [torch.arange(len(b)) % 3 == 1 for b in regions.boxes]
    some = regions.where(marked)
    for parts in zip(some.anchors, regions.anchors, marked):
        assert torch.equal(parts[0], parts[1][parts[2]])
    head = view.family.dense_head
    tower = view.tower(Tower("cls", head.num_blocks("cls")))
    vectors = [vectors_of(tower, r.anchors, head.num_anchors) for r in (some, regions)]
    assert torch.equal(vectors[0], vectors[1][torch.cat(marked)])

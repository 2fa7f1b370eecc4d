"""G-DetKD's variants, by value and by gradient: vectors before the ReLU, the teacher's levels
weighted, detached weights, regions around objects, box deltas of other units."""

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from test_gdetkd_distiller import CKD_OFF, KEY, SGFI_OFF, distilled, model_of, views_of
from toys import batch, gradients, step

from d2kd.methods.gdetkd import class_aware_localization
from d2kd.methods.gt_jitter import MAX_SHIFT, MAX_STRETCH, jittered_objects

JITTER = [KEY + "ROIS", "gt_jitter"]
TEACHER_LEVELS = [KEY + "AGGREGATE", "teacher"]
BOXES = torch.tensor([[4.0, 6, 40, 50], [10, 2, 90, 60], [30, 30, 42, 44]])


def contrasted(model, inputs):
    """(student's vectors, teacher's) that the contrast got in one step, and the views."""
    kept = []
    contrast = model.distillers["GDetKD"].contrast
    handle = contrast.register_forward_hook(lambda _, args, __: kept.append(args[:2]))
    student, teacher, _ = views_of(model, inputs)
    handle.remove()
    return *kept[0], student, teacher


@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet", "GFL"])
def test_vectors_before_the_last_relu(tmp_path, name):
    """The same vectors otherwise, of the same pass of both heads."""
    after, teacher_after, *_ = contrasted(model_of(tmp_path, name, SGFI_OFF), batch())
    model, calls = model_of(tmp_path, name, [*SGFI_OFF, KEY + "PRE_RELU", True]), []
    for net in (model.student, model.teacher.detector):
        head = net.roi_heads.box_head if hasattr(net, "roi_heads") else net.head
        head.register_forward_hook(lambda head, *_: calls.append(head))
    before, teacher_before, *_ = contrasted(model, batch())
    assert len(calls) == len(set(calls)) == 2
    for x, y in ((before, after), (teacher_before, teacher_after)):
        assert (x < 0).any() and torch.equal(x.relu(), y)
    assert before.requires_grad and not teacher_before.requires_grad


def test_weighted_levels_of_the_teacher_equal_a_loop(tmp_path):
    model = model_of(tmp_path, "FasterRCNN", [*CKD_OFF, *TEACHER_LEVELS])
    student, teacher, _ = views_of(model, batch([(64, 96)]))
    method = model.distillers["GDetKD"]
    sgfi, boxes = method.imitation, [Boxes(BOXES)]
    with EventStorage():
        loss = sgfi(student.features, boxes, method.imitation_target(teacher, boxes))
    names = [level.name for level in teacher.family.levels]
    assert [level.name for level in sgfi.matched] == names == ["p2", "p3", "p4", "p5", "p6"]
    expected = 0
    for box in BOXES:
        box = [Boxes(box[None])]
        # What the student's own box head pools: the one level of the box's size
        ours = sgfi.adapters[0](student.rois(box).features)
        theirs = [
            pool([teacher.features[name]], box) for pool, name in zip(sgfi.teacher_poolers, names)
        ]
        products = [(sgfi.embed(x) * sgfi.embed(ours)).sum() for x in theirs]
        weights = (torch.stack(products) / sgfi.temperature).softmax(dim=0)
        expected += (sum(w * x for w, x in zip(weights, theirs)) - ours).square().mean() / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    parameters = [*sgfi.parameters(), model.student.backbone.fpn_output2.weight]
    grads = [torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, expected)]
    for got, wanted in zip(*grads):
        assert wanted.abs().sum() > 0
        assert torch.allclose(got, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("exponent, temperature", [(-9.0, 0.01), (9.0, 100.0)])
def test_a_temperature_that_left_its_range_comes_back(tmp_path, exponent, temperature):
    model = model_of(tmp_path, "RetinaNet", CKD_OFF)
    sgfi = model.distillers["GDetKD"].imitation
    with torch.no_grad():
        sgfi.log_temperature.fill_(exponent)
    distilled(step(model, batch()))["sgfi"].backward()
    assert sgfi.temperature.item() == pytest.approx(temperature, rel=1e-5)
    assert sgfi.log_temperature.grad != 0


def test_one_level_of_the_teacher_is_the_target_itself(tmp_path):
    model = model_of(tmp_path, "RetinaNet", [*CKD_OFF, *TEACHER_LEVELS])
    student, teacher, _ = views_of(model, batch([(64, 96)]))
    sgfi, boxes = model.distillers["GDetKD"].imitation, [Boxes(BOXES)]
    target = sgfi.pool_teacher(teacher.features, boxes)
    with EventStorage():
        loss = sgfi(student.features, boxes, target[:1].expand_as(target))
    ours = sgfi.pool_student(student.features, boxes)
    assert loss.item() == pytest.approx((ours[0] - target[0]).square().mean().item(), rel=1e-5)


def test_logged_shares_are_those_of_the_teachers_levels(tmp_path):
    model = model_of(tmp_path, "RetinaNet", [*CKD_OFF, *TEACHER_LEVELS])  # P3 - P7 and P2 - P6
    with EventStorage(19) as storage:
        model(batch())
    shares = [storage.latest()[f"distill/gdetkd_sgfi/p{k}"][0] for k in range(2, 7)]
    assert sum(shares) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("aggregate", ["student", "teacher"])
def test_detached_weights_are_constants(tmp_path, aggregate):
    opts = [*CKD_OFF, KEY + "AGGREGATE", aggregate]
    losses, grads = {}, {}
    for detach in (False, True):
        model = model_of(tmp_path, "FasterRCNN", [*opts, KEY + "DETACH_ALPHA", detach])
        losses[detach] = distilled(step(model, batch()))["sgfi"]
        losses[detach].backward()
        grads[detach] = gradients(model)
    assert losses[True] == losses[False]
    keys = {f"distillers.GDetKD.imitation.{n}" for n in ("embed.0.weight", "log_temperature")}
    assert keys <= grads[False].keys() and not keys & grads[True].keys()
    # All that is trained has a gradient, as DistributedDataParallel wants.
    trained = [p for p in model.distillers.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    constant = model_of(tmp_path, "FasterRCNN", opts)
    sgfi = constant.distillers["GDetKD"].imitation
    weights_of = sgfi.weights
    sgfi.weights = lambda *sides: weights_of(*sides).detach()
    distilled(step(constant, batch()))["sgfi"].backward()
    name = "student.backbone.fpn_output2.weight"
    assert torch.equal(grads[True][name], gradients(constant)[name])
    assert not torch.allclose(grads[True][name], grads[False][name], rtol=1e-3)


def objects(boxes, size=(100, 200)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.arange(len(boxes)) + 3)


def test_jitter_stays_near_its_object():
    target = objects([[100, 100, 140, 160], [220, 130, 240, 140]], size=(300, 300))
    torch.manual_seed(0)
    regions = jittered_objects(target, 1001)
    assert len(regions) == 1001 and regions.gt_classes.bincount().tolist() == [0, 0, 0, 501, 500]
    for k, (center, size) in enumerate([((120, 130), (40, 60)), ((230, 135), (20, 10))]):
        boxes = regions.proposal_boxes[regions.gt_classes == k + 3]
        shift = (boxes.get_centers() - torch.tensor(center)) / torch.tensor(size)
        stretch = (boxes.tensor[:, 2:] - boxes.tensor[:, :2]) / torch.tensor(size)
        # All of the allowed range is used, evenly to both sides, independently of each other.
        assert shift.abs().max() <= MAX_SHIFT + 1e-5
        assert torch.allclose(shift.amax(dim=0), torch.tensor(MAX_SHIFT), atol=0.01)
        assert shift.mean(dim=0).abs().max() < 0.03
        assert torch.allclose(stretch.amax(dim=0), torch.tensor(MAX_STRETCH), atol=0.02)
        assert torch.allclose(stretch.amin(dim=0), torch.tensor(1 / MAX_STRETCH), atol=0.02)
        assert stretch.log().mean(dim=0).abs().max() < 0.05
        numbers = torch.cat([shift, stretch.log()], dim=1).t().corrcoef()
        assert (numbers - torch.eye(4)).abs().max() < 0.2
        overlap = pairwise_iou(boxes, target.gt_boxes[k])
        assert overlap.min() > 0.2 and 0.3 < (overlap > 0.5).float().mean() < 0.95


def test_jitter_follows_torchs_seed_and_ends_at_the_border():
    target = objects([[0, 0, 60, 30], [190, 90, 200, 100], [300, 300, 400, 400], [5, 5, 5, 5]])
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(jittered_objects(target, 64).proposal_boxes.tensor)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    low, high = runs[0][:, :2], runs[0][:, 2:]
    assert (low >= 0).all() and (low <= high).all() and (high <= torch.tensor([200, 100])).all()


def test_no_objects_no_jitter():
    regions = jittered_objects(objects([]), 64)
    assert len(regions) == 0 and regions.proposal_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize("boxes", [None, [[[8, 8, 40, 40]], []], [[], []]])
def test_regions_around_objects(tmp_path, boxes):
    """As many per image as the student's box head samples; images without objects have none."""
    model, inputs = model_of(tmp_path, "FasterRCNN", JITTER), batch(boxes=boxes)
    student, teacher, targets = views_of(model, inputs)
    regions = model.distillers["GDetKD"].regions(student, teacher, targets)
    count = model.student.roi_heads.batch_size_per_image
    assert [len(b) for b in regions.boxes] == [count if len(t) else 0 for t in targets]
    for b, c, t in zip(regions.boxes, regions.classes, targets):
        chosen = c[:, None] == t.gt_classes
        assert (pairwise_iou(b, t.gt_boxes) * chosen).amax(dim=1).gt(0.1).all() if len(b) else True
    terms = distilled(step(model, inputs))
    assert all(x.isfinite() and (x > 0) == (boxes != [[], []]) for x in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.distillers.parameters())
    if boxes != [[], []]:
        assert model.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


def test_box_deltas_are_compared_in_the_students_units(tmp_path):
    """A box that both predict has other deltas, where BBOX_REG_WEIGHTS differ."""
    weights = "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"
    ours, theirs = (10.0, 20.0, 5.0, 4.0), (5.0, 5.0, 1.0, 8.0)
    teacher = {"teacher_opts": [weights, theirs]}
    model = model_of(tmp_path, "FasterRCNN", [weights, ours], **teacher)
    student, teacher, _ = views_of(model, batch())
    boxes = [p.proposal_boxes for p in student.proposals]
    found = model.distillers["GDetKD"].predictions(student, teacher, boxes)["bbox"]
    s, t = student.rois(boxes), teacher.rois(boxes)
    raw = [x.deltas.unflatten(1, (-1, 4)) / torch.tensor(w) for x, w in ((s, ours), (t, theirs))]
    expected = class_aware_localization(
        t.logits.softmax(dim=1), raw[1] * torch.tensor(ours), raw[0] * torch.tensor(ours)
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    proposals = Boxes.cat(boxes).tensor
    detectors = (model.student, model.teacher.detector)
    coders = [net.roi_heads.box_predictor.box2box_transform for net in detectors]
    scaled = t.deltas * model.distillers["GDetKD"].delta_scale.repeat(6)
    same = [c.apply_deltas(d, proposals) for c, d in zip(coders, (scaled, t.deltas))]
    assert torch.allclose(*same, atol=1e-3)


@pytest.mark.parametrize("agnostic", [(True, False), (False, True), (True, True)])
def test_class_agnostic_boxes(tmp_path, agnostic):
    """Of the student, of the teacher, of both."""
    key = "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
    teacher = {"teacher_opts": [key, agnostic[1]]}
    model = model_of(tmp_path, "FasterRCNN", [key, agnostic[0]], **teacher)
    term = distilled(step(model, batch()))["bbox"]
    term.backward()
    assert term > 0
    assert model.student.roi_heads.box_predictor.bbox_pred.weight.grad.abs().sum() > 0

"""RoI views of Faster, Mask, Keypoint and Cascade R-CNN."""

import copy

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Keypoints, pairwise_iou
from detectron2.utils.events import EventStorage
from toys import STUDENTS, batch, detector, gradients, step

from d2kd.modeling import Teacher, build_family
from d2kd.modeling.recorder import Recorder
from d2kd.modeling.views import StudentView

NEEDS = frozenset({"features", "proposals", "rois"})
DETECTORS = {
    "faster": [],
    "class-agnostic": ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    "on predicted boxes": ["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True],
    "mask": ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8]
    + ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1],
    "keypoint": ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8]]
    + ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2],
    "cascade": ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
    + ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
}
every_detector = pytest.mark.parametrize("name", DETECTORS)


def two_stage(name, seed=0, opts=()):
    small = ["MODEL.FPN.OUT_CHANNELS", 32]
    return detector(STUDENTS["FasterRCNN"], [*small, *DETECTORS[name], *opts], seed=seed)


def inputs_with_masks_and_keypoints():
    inputs = batch()
    for x in inputs:
        boxes = x["instances"].gt_boxes.tensor
        masks = torch.zeros(len(boxes), x["height"], x["width"], dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top:bottom, left:right] = True
        x["instances"].gt_masks = BitMasks(masks)
        points = torch.stack([boxes[:, :2] + 2, boxes[:, 2:] - 2], dim=1)
        visible = torch.full((len(boxes), 2, 1), 2.0)
        x["instances"].gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
    return inputs


def student_view(student, inputs):
    """The losses of a training step, and the view of it."""
    family = build_family(student)
    with Recorder(family.taps(NEEDS)) as recorder:
        losses = step(student, inputs)
    return losses, StudentView(family, recorder, [(x["height"], x["width"]) for x in inputs])


def teacher_view(teacher, student, inputs, view):
    teacher = Teacher(teacher, input_format="BGR", student=student, student_format="BGR")
    return teacher.view(inputs, view, NEEDS)


def boxes_of(proposals):
    return [p.proposal_boxes for p in proposals]


def calls_of(modules):
    """A list that grows by a name whenever one of the modules runs."""
    calls = []
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@every_detector
def test_student_rois_are_those_of_its_forward(name):
    """The student's own class loss follows from the labels and logits in the view."""
    student = two_stage(name)
    losses, view = student_view(student, inputs_with_masks_and_keypoints())
    head = view.family.box_head
    for stage in range(head.num_stages):
        proposals = view.proposals_of(stage)
        rois = view.rois(boxes_of(proposals), stage)
        labels = torch.cat([p.gt_classes for p in proposals])
        count = sum(len(p) for p in proposals)
        assert rois.features.shape == (count, 32, 7, 7)
        assert rois.hidden.shape == (count, 16)
        assert (rois.pre_activation < 0).any()
        assert torch.equal(rois.pre_activation.relu(), rois.hidden)
        assert rois.logits.shape == (count, 7)
        assert rois.deltas.shape == (count, 4 if name in ("class-agnostic", "cascade") else 24)
        loss = losses[f"loss_cls_stage{stage}" if name == "cascade" else "loss_cls"]
        assert torch.equal(torch.nn.functional.cross_entropy(rois.logits, labels), loss)
        assert torch.equal(head.predictor(stage)(rois.hidden)[0], rois.logits)
        with EventStorage():
            box_loss = head.predictor(stage).losses((rois.logits, rois.deltas), proposals)
        expected = f"loss_box_reg_stage{stage}" if name == "cascade" else "loss_box_reg"
        assert torch.equal(box_loss["loss_box_reg"], losses[expected])


@every_detector
def test_observing_changes_nothing(name):
    plain, student = two_stage(name), two_stage(name)
    inputs = inputs_with_masks_and_keypoints()
    expected = step(plain, inputs)
    losses, _ = student_view(student, inputs)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[k], expected[k]) for k in expected)
    sum(expected.values()).backward()
    sum(losses.values()).backward()
    wanted, got = gradients(plain), gradients(student)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[k], got[k]) for k in wanted)


@every_detector
def test_no_second_pass_for_some_of_the_boxes_that_were_seen(name):
    student = two_stage(name)
    _, view = student_view(student, inputs_with_masks_and_keypoints())
    calls = calls_of({"pooler": student.roi_heads.box_pooler})
    boxes = boxes_of(view.proposals)
    labels = [p.gt_classes for p in view.proposals]
    some = view.select(boxes, [x < 6 for x in labels])
    rois, foreground = view.rois(some), torch.cat(labels) < 6
    assert not calls and 0 < len(rois.logits) < len(foreground)
    for part, everything in zip(rois, view.rois(boxes)):
        assert torch.equal(part, everything[foreground])
    assert torch.equal(Boxes.cat(some).tensor, Boxes.cat(boxes).tensor[foreground])


@every_detector
def test_no_second_pass_for_boxes_that_were_seen(name):
    student = two_stage(name)
    _, view = student_view(student, inputs_with_masks_and_keypoints())
    heads = student.roi_heads
    calls = calls_of({"backbone": student.backbone, "pooler": heads.box_pooler})
    for stage in range(view.family.box_head.num_stages):
        view.rois(boxes_of(view.proposals_of(stage)), stage)
    assert calls == []
    others = [Boxes(b.tensor.clone()) for b in boxes_of(view.proposals)]
    assert view.rois(others) is view.rois(others)
    assert calls == ["pooler"]


@every_detector
def test_given_boxes_equal_recorded_ones_with_gradient(name):
    """The head run on the same coordinates gives the same values and the same gradients."""
    inputs = inputs_with_masks_and_keypoints()
    results = []
    for clone in (False, True):
        student = two_stage(name)
        _, view = student_view(student, inputs)
        stage = view.family.box_head.num_stages - 1
        boxes = boxes_of(view.proposals_of(stage))
        rois = view.rois([Boxes(b.tensor.clone()) for b in boxes] if clone else boxes, stage)
        rois.logits.square().sum().backward()
        results.append((rois, student.backbone.fpn_lateral2.weight.grad))
    (recorded, grad), (run, grad_of_run) = results
    assert all(torch.equal(a, b) for a, b in zip(recorded, run))
    assert grad.abs().sum() > 0 and torch.allclose(grad, grad_of_run, rtol=1e-4, atol=1e-9)


def frozen(name, student, inputs):
    """A teacher and its view, with the step that the student made."""
    teacher = two_stage(name, seed=5)
    _, view = student_view(student, inputs)
    return teacher, teacher_view(teacher, student, inputs, view), view


@every_detector
def test_teacher_rois_are_those_of_its_own_inference(name):
    inputs, student = inputs_with_masks_and_keypoints(), two_stage(name)
    teacher, taught, _ = frozen(name, student, inputs)
    head = taught.family.box_head
    with torch.no_grad(), Recorder(head.taps()) as recorder:
        teacher.inference(inputs)
    for stage, (boxes, expected) in enumerate(head.recorded(recorder.calls)[: head.num_stages]):
        rois = taught.rois(boxes, stage)
        assert all(torch.equal(a, b) for a, b in zip(rois, expected))
        assert not any(x.requires_grad for x in rois)


@every_detector
def test_teacher_proposals_are_those_of_training(name):
    inputs, student = inputs_with_masks_and_keypoints(), two_stage(name)
    teacher, taught, _ = frozen(name, student, inputs)
    calls = calls_of({"backbone": teacher.backbone, "rpn": teacher.proposal_generator.rpn_head})
    outputs = taught.calls("backbone")[0][1], taught.calls("head")[0][1]
    ours = taught.family.propose(*outputs, taught.images.image_sizes)
    assert calls == ["backbone", "rpn"]
    training = copy.deepcopy(teacher.proposal_generator).train()
    with EventStorage():
        targets = [x["instances"] for x in inputs]
        expected, _ = training(taught.images, outputs[0], targets)
    for p, q in zip(ours, expected):
        assert len(p) > 100  # more than at test time
        assert torch.equal(p.proposal_boxes.tensor, q.proposal_boxes.tensor)
        assert torch.equal(p.objectness_logits, q.objectness_logits)
    assert not any(m.training for m in teacher.modules())


@every_detector
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_labels_of_proposals_follow_from_their_overlaps(name, who):
    inputs, student = inputs_with_masks_and_keypoints(), two_stage(name)
    _, taught, view = frozen(name, student, inputs)
    sampler = view if who == "student" else taught
    thresholds = [0.5, 0.6, 0.7][: sampler.family.box_head.num_stages]
    count = sampler.family.box_head.batch_size_per_image
    for stage, threshold in enumerate(thresholds):
        with EventStorage() as storage:
            proposals = sampler.proposals_of(stage)
        assert not any(k.startswith(("roi_head", "stage")) for k in storage.latest())
        for p, x in zip(proposals, inputs):
            overlap = pairwise_iou(x["instances"].gt_boxes, p.proposal_boxes)
            best, which = overlap.max(dim=0)
            expected = torch.where(best >= threshold, x["instances"].gt_classes[which], 6)
            assert torch.equal(p.gt_classes, expected)
            assert stage or (len(p) == count and 0 < (expected < 6).sum() <= count // 4)


@every_detector
def test_images_without_objects(name):
    student = two_stage(name)
    inputs = batch(boxes=[[], []])
    if name in ("mask", "keypoint"):
        for x in inputs:
            x["instances"].gt_masks = BitMasks(torch.zeros(0, x["height"], x["width"]))
            x["instances"].gt_keypoints = Keypoints(torch.zeros(0, 2, 3))
    _, taught, view = frozen(name, student, inputs)
    with EventStorage():
        for stage in range(view.family.box_head.num_stages):
            for sampler in (view, taught):
                proposals = sampler.proposals_of(stage)
                assert all((p.gt_classes == 6).all() for p in proposals)
                assert torch.isfinite(taught.rois(boxes_of(proposals), stage).logits).all()


def test_no_boxes_at_all():
    student, inputs = two_stage("faster"), batch()
    _, taught, view = frozen("faster", student, inputs)
    none = [Boxes(torch.zeros(0, 4)) for _ in inputs]
    for v in (view, taught):
        rois = v.rois(none)
        assert rois.features.shape == (0, 32, 7, 7) and rois.logits.shape == (0, 7)
    view.rois(none).logits.sum().backward()


def test_box_heads_that_end_in_convolutions():
    opts = ["MODEL.ROI_BOX_HEAD.NUM_FC", 0, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1]
    student = two_stage("faster", opts=[*opts, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8])
    _, view = student_view(student, batch())
    head, rois = view.family.box_head, view.rois(boxes_of(view.proposals))
    assert head.last_fc(0) is None and rois.pre_activation is None
    assert rois.hidden.shape[1] == head.hidden_dim(0) == 8 * 7 * 7
    assert torch.equal(head.predictor(0)(rois.hidden)[0], rois.logits)


def test_detectors_without_a_box_head_do_not_offer_rois():
    opts = ["MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p4"]]
    opts += ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"]
    family = build_family(two_stage("faster", opts=opts))
    assert family.offers == {"stages", "features", "dense"}

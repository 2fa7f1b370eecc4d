"""Regions of Faster, Mask, Keypoint and Cascade R-CNN: proposals, and outputs of box heads."""

import copy

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Keypoints, pairwise_iou
from detectron2.utils.events import EventStorage
from toys import STUDENTS, batch, detector, gradients, step

from d2kd.distillation.teacher import Teacher, TeacherPass
from d2kd.views import (
    CannotRead,
    Dense,
    Features,
    Proposals,
    Recorder,
    RegionOutputs,
    Regions,
    RegionSet,
    StudentView,
    build_family,
)

EVERYTHING = {"pooled": True, "hidden": True, "predictions": True, "pre_activation": True}
ALL, POOLED, PREDICTIONS = Regions(**EVERYTHING), Regions(pooled=True), Regions(predictions=True)
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
    common = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 16]
    return detector(STUDENTS["FasterRCNN"], [*common, *DETECTORS[name], *opts], seed=seed)


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


def of_stage(stage):
    """All that can be read of a stage's box head."""
    return Regions(**EVERYTHING, stage=stage)


def reads_of(family):
    stages = range(family.box_head.num_stages)
    every_stage = [read for k in stages for read in (Proposals(k), of_stage(k))]
    return [Features(), Dense(), POOLED, PREDICTIONS, *every_stage]


def student_view(student, inputs, reads=None):
    """The losses of a training step, and the view of it."""
    family = build_family(student)
    reads = reads_of(family) if reads is None else reads
    with Recorder(family.observed(reads)) as recorder:
        losses = step(student, inputs)
    sizes = [(x["height"], x["width"]) for x in inputs]
    return losses, StudentView(family, reads, recorder, sizes, targets_of(inputs))


def targets_of(inputs):
    return [x["instances"] for x in inputs]


def teacher_of(view, name="faster"):
    """A frozen detector beside the student of a view."""
    net, student = two_stage(name, seed=5), view.family.detector
    return Teacher(net, input_format="BGR", student=student, student_format="BGR")


def teach(teacher, view, inputs):
    """The teacher's view of the student's batch."""
    teacher_pass = TeacherPass(teacher, inputs, reads_of(teacher.family))
    teacher_pass.run_backbone(view.images.tensor)
    return teacher_pass.finish(targets_of(inputs))


def teacher_view(name, view, inputs):
    with EventStorage():
        return teach(teacher_of(view, name), view, inputs)


def clones(regions):
    """The same boxes, but nothing that is known of them."""
    return RegionSet([Boxes(b.tensor.clone()) for b in regions.boxes], regions.classes)


def calls_of(modules):
    """A list that grows by a name whenever one of the modules runs."""
    calls = []
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs))


@every_detector
def test_student_regions_are_those_of_its_forward(name):
    """The student's own losses follow from the labels, logits and deltas in the view."""
    student, inputs = two_stage(name), inputs_with_masks_and_keypoints()
    losses, view = student_view(student, inputs)
    head = view.family.box_head
    for stage in range(head.num_stages):
        regions = view.proposals(Proposals(stage))
        outputs = view.regions(regions, of_stage(stage))
        labels, count = torch.cat(regions.classes), sum(len(b) for b in regions.boxes)
        assert outputs.pooled.shape == (count, 32, 7, 7)
        assert outputs.hidden.shape == (count, 16)
        assert (outputs.pre_activation < 0).any()
        assert torch.equal(outputs.pre_activation.relu(), outputs.hidden)
        assert outputs.logits.shape == (count, 7)
        assert outputs.deltas.shape == (count, 4 if name in ("class-agnostic", "cascade") else 24)
        loss = losses[f"loss_cls_stage{stage}" if name == "cascade" else "loss_cls"]
        assert torch.equal(torch.nn.functional.cross_entropy(outputs.logits, labels), loss)
        assert torch.equal(head.predictor(stage)(outputs.hidden)[0], outputs.logits)


@every_detector
def test_labelled_boxes_give_the_students_box_loss(name):
    """Stage by stage: the recorded proposals, with the objects that they were matched with."""
    student, inputs = two_stage(name), inputs_with_masks_and_keypoints()
    family = build_family(student)
    with Recorder(family.observed(reads_of(family))) as recorder:
        losses = step(student, inputs)
    head = family.box_head
    for stage in range(head.num_stages):
        outputs = head.recorded(recorder, stage)
        with EventStorage():
            box_loss = head.predictor(stage).losses(
                (outputs.logits, outputs.deltas), head.recorded_proposals(recorder, stage)
            )
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
def test_no_second_pass_for_some_of_the_regions_that_were_seen(name):
    """Nor for some of these."""
    student = two_stage(name)
    _, view = student_view(student, inputs_with_masks_and_keypoints())
    calls = calls_of({"pooler": student.roi_heads.box_pooler})
    regions = view.proposals(Proposals())
    foreground = torch.cat(regions.classes) < 6
    some = regions.where([x < 6 for x in regions.classes])
    fewer = some.where([torch.arange(len(b)) % 2 == 0 for b in some.boxes])
    rows = foreground.nonzero()[torch.cat([torch.arange(len(b)) % 2 == 0 for b in some.boxes]), 0]
    everything = view.regions(regions, ALL)
    assert 0 < len(rows) < foreground.sum() < len(foreground)
    for chosen, index in ((some, foreground), (fewer, rows)):
        assert same(view.regions(chosen, ALL), [x[index] for x in everything])
        assert torch.equal(Boxes.cat(chosen.boxes).tensor, Boxes.cat(regions.boxes).tensor[index])
        assert torch.equal(torch.cat(chosen.classes), torch.cat(regions.classes)[index])
    assert not calls


@every_detector
def test_no_second_pass_for_regions_that_were_seen(name):
    student = two_stage(name)
    _, view = student_view(student, inputs_with_masks_and_keypoints())
    calls = calls_of({"backbone": student.backbone, "pooler": student.roi_heads.box_pooler})
    for stage in range(view.family.box_head.num_stages):
        regions = view.proposals(Proposals(stage))
        assert view.proposals(Proposals(stage)) is regions
        view.regions(regions, of_stage(stage))
    assert calls == []
    others = clones(view.proposals(Proposals()))
    assert same(view.regions(others, ALL), view.regions(others, ALL))
    assert calls == ["pooler"]


@every_detector
def test_the_box_head_runs_no_further_than_asked(name):
    """RoI features alone do not run it, and are not pooled again when more is asked."""
    student, inputs = two_stage(name), inputs_with_masks_and_keypoints()
    _, view = student_view(student, inputs)
    taught = teacher_view(name, view, inputs)
    head = taught.family.box_head
    calls = calls_of({"pooler": head.module.box_pooler, "head": head.head(0)})
    regions = view.proposals(Proposals())
    outputs = taught.regions(regions, POOLED)
    assert calls == ["pooler"] and outputs == RegionOutputs(outputs.pooled)
    predicted = taught.regions(regions, PREDICTIONS)
    assert calls == ["pooler", "head"] and predicted.pooled is outputs.pooled
    some = regions.where([x < 6 for x in regions.classes])
    taught.regions(some, ALL)
    assert calls == ["pooler", "head"]
    chosen_first = clones(regions).where([x < 6 for x in regions.classes])
    assert len(taught.regions(chosen_first, PREDICTIONS).logits) == len(Boxes.cat(some.boxes))
    assert calls == ["pooler", "head"] * 2


def test_a_student_whose_pooled_features_alone_are_read_is_observed_no_further():
    student, inputs = two_stage("faster"), batch()
    _, view = student_view(student, inputs, [Proposals(), POOLED])
    outputs = view.regions(view.proposals(Proposals()), POOLED)
    assert outputs.pooled is not None and outputs == RegionOutputs(outputs.pooled)
    with pytest.raises(LookupError, match="reads 'box predictions'"):
        view.regions(view.proposals(Proposals()), PREDICTIONS)
    with pytest.raises(LookupError, match="reads 'proposals of stage 1'"):
        view.proposals(Proposals(1))


@every_detector
def test_given_boxes_equal_recorded_ones_with_gradient(name):
    """The head run on the same coordinates gives the same values and the same gradients."""
    inputs = inputs_with_masks_and_keypoints()
    results = []
    for clone in (False, True):
        student = two_stage(name)
        _, view = student_view(student, inputs)
        stage = view.family.box_head.num_stages - 1
        regions = view.proposals(Proposals(stage))
        outputs = view.regions(clones(regions) if clone else regions, of_stage(stage))
        outputs.logits.square().sum().backward()
        results.append((outputs, student.backbone.fpn_lateral2.weight.grad))
    (recorded, grad), (run, grad_of_run) = results
    assert same(recorded, run)
    assert grad.abs().sum() > 0 and torch.allclose(grad, grad_of_run, rtol=1e-4, atol=1e-9)


@every_detector
def test_teacher_regions_are_those_of_its_own_inference(name):
    inputs = inputs_with_masks_and_keypoints()
    _, view = student_view(two_stage(name), inputs)
    taught = teacher_view(name, view, inputs)
    head, family = taught.family.box_head, taught.family
    with torch.no_grad(), Recorder(family.observed(reads_of(family))) as recorder:
        family.detector.inference(inputs)
    for stage, call in enumerate(recorder.calls(head.module.box_pooler)[: head.num_stages]):
        boxes = call.inputs[1]
        outputs = taught.regions(RegionSet(boxes, [torch.zeros(0)] * 2), of_stage(stage))
        assert len(outputs.logits) > 0 and same(outputs, head.recorded(recorder, stage))
        assert not any(x.requires_grad for x in outputs)


@every_detector
def test_teacher_proposals_are_those_of_training(name):
    inputs = inputs_with_masks_and_keypoints()
    _, view = student_view(two_stage(name), inputs)
    frozen = teacher_of(view, name)
    teacher = frozen.detector
    calls = calls_of({"backbone": teacher.backbone, "rpn": teacher.proposal_generator.rpn_head})
    with EventStorage():
        taught = teach(frozen, view, inputs)
    outputs = taught.predictions.logits, taught.predictions.deltas
    ours = taught.family.propose(taught.features, outputs, view.images.image_sizes)
    assert calls == ["backbone", "rpn"]
    training = copy.deepcopy(teacher.proposal_generator).train()
    with EventStorage():
        expected, _ = training(view.images, taught.features, targets_of(inputs))
    for p, q in zip(ours, expected):
        assert len(p) > 100  # more than at test time
        assert torch.equal(p.proposal_boxes.tensor, q.proposal_boxes.tensor)
        assert torch.equal(p.objectness_logits, q.objectness_logits)
    assert not any(m.training for m in teacher.modules())


def test_teacher_samples_with_random_numbers_of_its_own():
    """The student's go on as if the teacher had drawn none; the teacher's own go on, too."""
    _, view = student_view(two_stage("faster"), batch())
    sampled = []
    for _ in range(2):
        torch.manual_seed(4)  # from which the teacher's own stream starts
        teacher = teacher_of(view)
        state = torch.get_rng_state()
        with EventStorage():
            for _ in range(2):
                regions = teach(teacher, view, batch()).proposals(Proposals())
                sampled.append(Boxes.cat(regions.boxes).tensor)
        assert torch.equal(torch.get_rng_state(), state)
    assert same(sampled[:2], sampled[2:]) and not torch.equal(sampled[0], sampled[1])


@every_detector
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_labels_of_proposals_follow_from_their_overlaps(name, who):
    inputs = inputs_with_masks_and_keypoints()
    _, view = student_view(two_stage(name), inputs)
    taught = teacher_view(name, view, inputs)
    sampler = view if who == "student" else taught
    thresholds = [0.5, 0.6, 0.7][: sampler.family.box_head.num_stages]
    count = sampler.family.box_head.module.batch_size_per_image
    for stage, threshold in enumerate(thresholds):
        with EventStorage() as storage:
            regions = sampler.proposals(Proposals(stage))
        assert not any(k.startswith(("roi_head", "stage")) for k in storage.latest())
        for boxes, classes, x in zip(regions.boxes, regions.classes, inputs):
            overlap = pairwise_iou(x["instances"].gt_boxes, boxes)
            best, which = overlap.max(dim=0)
            expected = torch.where(best >= threshold, x["instances"].gt_classes[which], 6)
            assert torch.equal(classes, expected)
            assert stage or (len(boxes) == count and 0 < (expected < 6).sum() <= count // 4)


def test_what_the_teacher_samples_is_logged_apart():
    _, view = student_view(two_stage("cascade"), batch())
    with EventStorage() as storage:
        teach(teacher_of(view, "cascade"), view, batch())
    assert storage.latest() and all(k.startswith("teacher/") for k in storage.latest())


@every_detector
def test_images_without_objects(name):
    inputs = batch(boxes=[[], []])
    if name in ("mask", "keypoint"):
        for x in inputs:
            x["instances"].gt_masks = BitMasks(torch.zeros(0, x["height"], x["width"]))
            x["instances"].gt_keypoints = Keypoints(torch.zeros(0, 2, 3))
    _, view = student_view(two_stage(name), inputs)
    taught = teacher_view(name, view, inputs)
    for stage in range(view.family.box_head.num_stages):
        for sampler in (view, taught):
            regions = sampler.proposals(Proposals(stage))
            assert all((classes == 6).all() for classes in regions.classes)
            assert torch.isfinite(taught.regions(regions, of_stage(stage)).logits).all()


def test_no_boxes_at_all():
    inputs = batch()
    _, view = student_view(two_stage("faster"), inputs)
    taught = teacher_view("faster", view, inputs)
    empty = RegionSet([Boxes(torch.zeros(0, 4)) for _ in inputs], [torch.zeros(0).long()] * 2)
    proposals = view.proposals(Proposals())
    for none in (empty, proposals.where([x < 0 for x in proposals.classes])):
        for v in (view, taught):
            outputs = v.regions(none, ALL)
            assert outputs.pooled.shape == (0, 32, 7, 7) and outputs.logits.shape == (0, 7)
        view.regions(none, ALL).logits.sum().backward(retain_graph=True)


def test_box_heads_that_end_in_convolutions():
    opts = ["MODEL.ROI_BOX_HEAD.NUM_FC", 0, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1]
    student = two_stage("faster", opts=[*opts, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8])
    read = Regions(pooled=True, hidden=True, predictions=True)
    _, view = student_view(student, batch(), [Proposals(), read])
    head, outputs = view.family.box_head, view.regions(view.proposals(Proposals()), read)
    assert head.last_fc(0) is None and outputs.pre_activation is None
    assert outputs.hidden.shape[1] == head.hidden_dim(0) == 8 * 7 * 7
    assert torch.equal(head.predictor(0)(outputs.hidden)[0], outputs.logits)
    with pytest.raises(CannotRead, match="the box head of GeneralizedRCNN has no fully connected"):
        view.family.observe(Regions(pre_activation=True))


@pytest.mark.parametrize("read", [Proposals(), POOLED, PREDICTIONS], ids=str)
def test_detectors_without_a_box_head_say_why(read):
    opts = ["MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p4"]]
    opts += ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"]
    for net in (two_stage("faster", opts=opts), detector(STUDENTS["RetinaNet"])):
        with pytest.raises(CannotRead, match=f"{type(net).__name__} is not a two-stage detector"):
            build_family(net).observe(read)


@pytest.mark.parametrize("name, stage, heads", [("faster", 1, 1), ("cascade", 3, 3)])
def test_stages_that_a_detector_does_not_have_are_named(name, stage, heads):
    for read in (Proposals(stage), of_stage(stage)):
        with pytest.raises(CannotRead, match=rf"GeneralizedRCNN has {heads} box head\(s\), from 0"):
            build_family(two_stage(name)).observe(read)

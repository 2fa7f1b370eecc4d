"""Views: preprocessing of each detector's own, levels that fit, towers that resume, and nothing
that was not declared."""

import pytest
import torch
from detectron2.structures import ImageList
from toys import STUDENTS, batch, detector, step

from d2kd.distillation import Teacher
from d2kd.distillation.teacher import TeacherPass
from d2kd.views import (
    Assignment,
    CannotRead,
    Dense,
    Features,
    Recorder,
    Stage,
    StudentView,
    Tower,
    build_family,
)

READS = (Features(), Stage("res3"), Dense())


def views(
    student, teacher, reads=READS, sizes=((96, 128), (80, 100)), precision="", **teacher_options
):
    """Both views of one batch, and the inputs."""
    inputs = batch(sizes)
    options = {"input_format": "BGR", "student_format": "BGR", **teacher_options}
    frozen = Teacher(teacher, student=student, **options)
    frozen.precision_name = precision
    family = build_family(student)
    with Recorder(family.observed(reads)) as recorder:
        step(student, inputs)
    targets = [x["instances"] for x in inputs]
    student_view = StudentView(family, reads, recorder, list(sizes), targets)
    teacher_pass = TeacherPass(frozen, inputs, reads)
    teacher_pass.run_backbone(student_view.images.tensor)
    return student_view, teacher_pass.finish(targets), inputs


def by_hand(teacher, inputs, flip, padded):
    """The teacher's features, computed from raw pixels without d2kd."""
    images = torch.zeros(len(inputs), 3, *padded)
    for i, x in enumerate(inputs):
        pixels = x["image"].float()
        pixels = pixels.flip(0) if flip else pixels
        height, width = pixels.shape[-2:]
        normalised = (pixels - teacher.pixel_mean) / teacher.pixel_std
        images[i, :, :height, :width] = normalised
    with torch.no_grad():
        return teacher.backbone(images)


@pytest.mark.parametrize("flip", [False, True], ids=["BGR", "RGB"])
def test_teacher_gets_raw_pixels_through_its_own_preprocessing(flip):
    opts = ["MODEL.PIXEL_MEAN", [10.0, 20.0, 30.0], "MODEL.PIXEL_STD", [57.0, 58.0, 59.0]]
    teacher = detector(STUDENTS["FCOS"], opts)
    order = "RGB" if flip else "BGR"
    _, view, inputs = views(detector(STUDENTS["FCOS"]), teacher, input_format=order)
    expected = by_hand(teacher, inputs, flip, (96, 128))
    for name, feature in view.features.items():
        assert torch.allclose(feature, expected[name], atol=1e-6), name


def test_same_preprocessing_is_done_once():
    nets = [detector(STUDENTS["FCOS"], seed=i) for i in range(2)]
    nets[1].preprocess_image = lambda _: pytest.fail("the teacher normalised the images again")
    student, _, _ = views(*nets)
    assert isinstance(student.images, ImageList)
    assert student.images.image_sizes == [(96, 128), (80, 100)]


def test_channels_are_flipped_where_nothing_else_differs():
    opts = ["MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [60.0] * 3]
    student, net = (detector(STUDENTS["FCOS"], opts, seed=i) for i in range(2))
    teacher = Teacher(net, input_format="RGB", student=student, student_format="BGR")
    inputs = batch()
    images = build_family(student).preprocess(inputs)
    assert torch.equal(teacher.preprocess(inputs, images).tensor, images.tensor.flip(1))


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_a_backbone_that_takes_images_of_any_size(side):
    """Its grid is 0."""
    nets = [detector(STUDENTS["RetinaNet"], seed=i) for i in range(2)]
    nets[side].backbone._size_divisibility = 0
    inputs, family = batch([(90, 120)]), build_family(nets[0])
    images = family.preprocess(inputs)
    teacher = Teacher(nets[1], input_format="BGR", student=nets[0], student_format="BGR")
    h, w = images.tensor.shape[-2:]
    height, width = teacher.preprocess(inputs, images).tensor.shape[-2:]
    assert height >= h and width >= w
    levels = [torch.zeros(1, 1, -(-h // x.stride), -(-w // x.stride)) for x in family.levels]
    assert family.assign(family.anchors(levels), [x["instances"] for x in inputs]).valid.any()


@pytest.mark.parametrize("grids", [(32, 64), (64, 32)], ids=["teacher coarser", "student coarser"])
def test_levels_fit_when_paddings_differ(grids):
    nets = [detector(STUDENTS["RetinaNet"], seed=i) for i in range(2)]
    for net, grid in zip(nets, grids):
        net.backbone._size_divisibility = grid
    student, teacher, inputs = views(*nets)
    for a, b in zip(student.features.values(), teacher.features.values()):
        assert a.shape == b.shape
    for a, b in zip(student.predictions.logits, teacher.predictions.logits):
        assert a.shape == b.shape
    assert student.stage(Stage("res3")).shape[-2:] == teacher.stage(Stage("res3")).shape[-2:]
    expected = by_hand(nets[1], inputs, False, (128, 128))["p3"]
    height, width = student.features["p3"].shape[-2:]
    assert torch.allclose(teacher.features["p3"], expected[..., :height, :width], atol=1e-6)


@pytest.mark.parametrize("grids", [(32, 64), (32, 32)], ids=["teacher coarser", "same"])
def test_statistics_of_the_towers_and_nothing_else_of_them(grids):
    nets = [detector(STUDENTS["FCOS"], seed=i) for i in range(2)]
    for net, grid in zip(nets, grids):
        net.backbone._size_divisibility = grid
    maps = [Tower("cls", 0), Tower("cls", 2, True)]
    frugal = [Tower("cls", x.depth, x.pre_activation, statistics=True) for x in maps]
    _, whole, _ = views(*nets, reads=maps)
    _, view, _ = views(*nets, reads=frugal)
    for read, reduced in zip(maps, frugal):
        statistics, levels = view.tower_statistics(reduced), whole.tower(read)
        assert len(statistics) == len(levels) == 5
        for (mean, std), x in zip(statistics, levels):
            torch.testing.assert_close(mean, x.mean((0, 2, 3), keepdim=True))
            torch.testing.assert_close(std, x.std((0, 2, 3), keepdim=True), rtol=1e-4, atol=1e-6)
    assert view._recorder.calls(view.block(frugal[1])) == []
    with pytest.raises(LookupError, match="cls tower at depth 2 before its activation"):
        view.tower(maps[1])


@pytest.mark.parametrize("student", STUDENTS)
def test_student_view_is_what_the_forward_computed(student):
    net = detector(STUDENTS[student])
    view, _, inputs = views(net, detector(STUDENTS[student], seed=1))
    with torch.no_grad():
        images = net.preprocess_image(inputs)
        assert torch.equal(view.images.tensor, images.tensor)
    assert view.stage(Stage("res3")).shape[-2:] == (12, 16)
    strides = [level.stride for level in view.family.levels]
    for feature, stride in zip(view.features.values(), strides):
        assert feature.shape[-2:] == (-(-96 // stride), -(-128 // stride))
        assert feature.requires_grad
    head = view.family.dense_head
    assert view.predictions.logits[0].shape[1] == head.num_anchors * head.num_classes


@pytest.mark.parametrize("student", ["RetinaNet", "FCOS"])
def test_resuming_a_tower_gives_the_predictions_and_gradient(student):
    towers = [Tower(branch, depth) for branch in ("cls", "bbox") for depth in range(3)]
    nets = [detector(STUDENTS[student], seed=i) for i in range(2)]
    reads = [Dense(build_family(nets[0]).dense_head.outputs), *towers]
    _, view, _ = views(*nets, reads)
    assert view.family.dense_head.num_blocks("cls") == 2
    for depth in range(3):
        features = [x.clone().requires_grad_() for x in view.tower(Tower("cls", depth))]
        logits = view.resume("cls", depth, features)["logits"]
        for a, b in zip(logits, view.predictions.logits):
            assert torch.allclose(a, b, atol=1e-5)
        sum(x.sum() for x in logits).backward()
        assert all(x.grad is not None for x in features)
        boxes = view.resume("bbox", depth, view.tower(Tower("bbox", depth)))
        for a, b in zip(boxes["deltas"], view.predictions.deltas):
            assert torch.allclose(a, b, atol=1e-5)
        assert ("centerness" in boxes) == (view.predictions.centerness is not None)
    assert not any(p.grad is not None for p in view.family.detector.parameters())


@pytest.mark.parametrize(
    "student, branch", [("PaperFCOS", "cls"), ("FCOS", "bbox"), ("ATSS", "bbox")]
)
def test_families_name_the_branch_of_the_centerness(student, branch):
    name = {"PaperFCOS": "shapes/baselines/paper_fcos_tiny.yaml"}.get(student)
    head = build_family(detector(name or STUDENTS[student])).dense_head
    assert head.branch_of == {"logits": "cls", "deltas": "bbox", "centerness": branch}


@pytest.mark.parametrize("student", STUDENTS)
def test_outputs_that_a_head_does_not_have_are_refused(student):
    family = build_family(detector(STUDENTS[student]))
    for output in ("logits", "deltas", "centerness"):
        if output in family.dense_head.outputs:
            family.observe(Dense((output,)))
        else:
            with pytest.raises(CannotRead, match=f"{family.name} predicts no {output}"):
                family.observe(Dense(("logits", output)))
    assert ("centerness" in family.dense_head.outputs) == (student in ("FCOS", "ATSS"))


def test_teacher_in_its_own_precision():
    nets = [detector(STUDENTS["FCOS"], seed=i) for i in range(2)]
    _, exact, _ = views(*nets, precision="float32")
    _, rough, _ = views(*nets, precision="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        assert exact.features["p3"].dtype == torch.float32
    assert rough.features["p3"].dtype == torch.bfloat16
    assert torch.allclose(rough.features["p3"].float(), exact.features["p3"], atol=0.1, rtol=0.1)


def test_reads_name_themselves():
    assert str(Tower("cls", 3, True, True)) == (
        "statistics of cls tower at depth 3 before its activation"
    )
    assert str(Stage("res4", True)) == "res4 before its activation"


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "ATSS", "GFL", "PaperFCOS"])
def test_assignment_is_the_students_own(name):
    """Of our detectors it is seen, not computed again."""
    path = {**STUDENTS, "PaperFCOS": "shapes/baselines/paper_fcos_tiny.yaml"}[name]
    student = detector(path).train()
    family, reads, calls = build_family(student), [Features(), Assignment()], []
    original = student.label_anchors
    student.label_anchors = lambda *args: calls.append(args) or original(*args)
    inputs = batch()
    with Recorder(family.observed(reads)) as recorder:
        step(student, inputs)
    targets = [x["instances"] for x in inputs]
    view = StudentView(family, reads, recorder, [x.image_size for x in targets], targets)
    assignment = view.assignment
    assert len(calls) == (2 if name == "RetinaNet" else 1)
    again = family.assign(family.anchors(list(view.features.values())), targets)
    assert torch.equal(assignment.labels, again.labels) and (assignment.labels >= 0).any()
    assert torch.equal(assignment.centerness, again.centerness)


def test_a_low_quality_match_outside_of_its_box_is_not_central():
    """RetinaNet gives a small box its nearest anchor, whose centre may lie beside it."""
    family = build_family(detector(STUDENTS["RetinaNet"]))
    levels = [torch.zeros(1, 1, -(-96 // x.stride), -(-128 // x.stride)) for x in family.levels]
    (inputs,) = batch(sizes=((96, 128),), boxes=[[[41.0, 30.0, 46.0, 50.0]]])
    targets = family.assign(family.anchors(levels), [inputs["instances"]])
    assert targets.positive.sum() == 1 and targets.centerness.sum() == 0


def test_boxes_of_half_precision_are_decoded_in_float32():
    """Detectron2's FCOS would round centres to the type of the deltas."""
    family = build_family(detector(STUDENTS["FCOS"]))
    torch.manual_seed(0)
    deltas = [torch.rand(1, 4, -(-96 // x.stride), -(-128 // x.stride)) for x in family.levels]
    deltas, anchors = [x.half() for x in deltas], family.anchors(deltas)
    expected = family.decode([x.float() for x in deltas], anchors)
    assert torch.equal(family.decode(deltas, anchors), expected)

"""Views: preprocessing of each detector's own, levels that fit, towers that resume."""

import pytest
import torch
from detectron2.structures import ImageList
from toys import STUDENTS, batch, detector, step

from d2kd.errors import UserError
from d2kd.modeling import Teacher, build_family
from d2kd.modeling.families import paired_levels
from d2kd.modeling.recorder import Recorder
from d2kd.modeling.views import StudentView

ALL = frozenset({"features", "stages", "dense"})


def views(student, teacher, needs=ALL, sizes=((96, 128), (80, 100)), **teacher_options):
    """Both views of one batch, and the inputs."""
    inputs = batch(sizes)
    options = {"input_format": "BGR", "student_format": "BGR", **teacher_options}
    frozen = Teacher(teacher, student=student, **options)
    family = build_family(student)
    with Recorder(family.taps(needs)) as recorder:
        step(student, inputs)
    student_view = StudentView(family, recorder, list(sizes))
    return student_view, frozen.view(inputs, student_view, needs), inputs


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
    student, teacher, _ = views(detector(STUDENTS["FCOS"]), detector(STUDENTS["FCOS"], seed=1))
    assert teacher.images.tensor is student.images.tensor
    assert isinstance(student.images, ImageList)
    assert student.images.image_sizes == [(96, 128), (80, 100)]


@pytest.mark.parametrize("grids", [(32, 64), (64, 32)], ids=["teacher coarser", "student coarser"])
def test_levels_fit_when_paddings_differ(grids):
    nets = [detector(STUDENTS["RetinaNet"], seed=i) for i in range(2)]
    for net, grid in zip(nets, grids):
        net.backbone._size_divisibility = grid
    student, teacher, inputs = views(*nets)
    for a, b in zip(student.features.values(), teacher.features.values()):
        assert a.shape == b.shape
    for a, b in zip(student.dense.logits, teacher.dense.logits):
        assert a.shape == b.shape
    expected = by_hand(nets[1], inputs, False, (128, 128))["p3"]
    height, width = student.features["p3"].shape[-2:]
    assert torch.allclose(teacher.features["p3"], expected[..., :height, :width], atol=1e-6)


@pytest.mark.parametrize("grids", [(32, 64), (32, 32)], ids=["teacher coarser", "same"])
def test_statistics_of_the_towers_and_nothing_else_of_them(grids):
    nets = [detector(STUDENTS["FCOS"], seed=i) for i in range(2)]
    for net, grid in zip(nets, grids):
        net.backbone._size_divisibility = grid
    _, whole, _ = views(*nets, needs=ALL | {"tower"})
    _, frugal, _ = views(*nets, needs=ALL | {"tower_statistics.0", "tower_statistics.2.pre"})
    for block in ((0,), (2, True)):
        statistics = frugal.dense.tower_statistics("cls", *block)
        maps = whole.dense.tower("cls", *block)
        assert len(statistics) == len(maps) == 5
        for (mean, std), x in zip(statistics, maps):
            torch.testing.assert_close(mean, x.mean((0, 2, 3), keepdim=True))
            torch.testing.assert_close(std, x.std((0, 2, 3), keepdim=True), rtol=1e-4, atol=1e-6)
    kept = [x for _, pair in frugal.calls("cls.2.pre.statistics") for x in pair]
    assert {x.shape[2:] for x in kept} == {(1, 1)}
    with pytest.raises(KeyError):
        frugal.dense.tower("cls", 2, True)


@pytest.mark.parametrize("student", STUDENTS)
def test_student_view_is_what_the_forward_computed(student):
    net = detector(STUDENTS[student])
    view, _, inputs = views(net, detector(STUDENTS[student], seed=1))
    with torch.no_grad():
        images = net.preprocess_image(inputs)
        assert torch.equal(view.images.tensor, images.tensor)
    assert list(view.stages) == [f"res{i}" for i in range(6 - len(view.stages), 6)]
    strides = [level.stride for level in view.family.levels]
    for feature, stride in zip(view.features.values(), strides):
        assert feature.shape[-2:] == (-(-96 // stride), -(-128 // stride))
        assert feature.requires_grad
    head = view.family.dense_head
    assert view.dense.logits[0].shape[1] == head.num_anchors * head.num_classes


@pytest.mark.parametrize("student", ["RetinaNet", "FCOS"])
def test_resuming_a_tower_gives_the_predictions_and_gradient(student):
    needs = ALL | {"tower"}
    _, view, _ = views(detector(STUDENTS[student]), detector(STUDENTS[student], seed=1), needs)
    for k in range(view.family.dense_head.num_blocks("cls") + 1):
        taps = [x.clone().requires_grad_() for x in view.dense.tower("cls", k)]
        logits = view.dense.resume("cls", k, taps)["logits"]
        for a, b in zip(logits, view.dense.logits):
            assert torch.allclose(a, b, atol=1e-5)
        sum(x.sum() for x in logits).backward()
        assert all(x.grad is not None for x in taps)
        boxes = view.dense.resume("bbox", k, view.dense.tower("bbox", k))
        for a, b in zip(boxes["deltas"], view.dense.deltas):
            assert torch.allclose(a, b, atol=1e-5)
        assert ("centerness" in boxes) == (view.dense.centerness is not None)
    assert not any(p.grad is not None for p in view.family.detector.parameters())


def test_teacher_in_its_own_precision():
    nets = [detector(STUDENTS["FCOS"], seed=i) for i in range(2)]
    _, exact, _ = views(*nets, precision="float32")
    _, rough, _ = views(*nets, precision="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        assert exact.features["p3"].dtype == torch.float32
    assert rough.features["p3"].dtype == torch.bfloat16
    assert torch.allclose(rough.features["p3"].float(), exact.features["p3"], atol=0.1, rtol=0.1)


def test_levels_are_paired_by_stride():
    dense = build_family(detector(STUDENTS["FCOS"]))
    two_stage = build_family(detector(STUDENTS["FasterRCNN"]))
    assert paired_levels(dense, two_stage) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    two_stage.levels = two_stage.levels[:1]
    with pytest.raises(UserError, match=r"X: no FPN level in common; strides .*\[4\]"):
        paired_levels(dense, two_stage, "X")


def test_unknown_architecture_names_the_registry():
    with pytest.raises(UserError, match="Linear.*FAMILY_REGISTRY"):
        build_family(torch.nn.Linear(1, 1))

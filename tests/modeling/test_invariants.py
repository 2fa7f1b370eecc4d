"""What always holds, for every family: the promises of the README."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from toys import STUDENTS, batch, config, detector, distill_config, gradients, step

from d2kd.modeling import TeacherStudent, build_model
from d2kd.modeling.weights import checksum

KD_OFF = ["DISTILL.FRS.FEATURE.WEIGHT", 0.0, "DISTILL.FRS.CLS.WEIGHT", 0.0]
NOT_YET = ["DISTILL.FRS.FEATURE.START_ITER", 10**6, "DISTILL.FRS.CLS.START_ITER", 10**6]


def trained_step(model, inputs):
    """Losses, gradients and buffers of a step, after one that warms the scripted losses up."""
    step(copy.deepcopy(model), inputs)
    losses = step(model, inputs)
    sum(losses.values()).backward()
    return losses


def seeded_model(cfg):
    torch.manual_seed(3)
    return build_model(cfg)


@pytest.mark.parametrize("opts", [KD_OFF, NOT_YET], ids=["weights 0", "before the start"])
@pytest.mark.parametrize("student", STUDENTS)
def test_kd_off_is_detectron2_bit_for_bit(tmp_path, student, opts):
    torch.manual_seed(3)
    plain = detector(STUDENTS[student], seed=3)
    model = seeded_model(distill_config(tmp_path, student, opts))
    ours = model.student if isinstance(model, TeacherStudent) else model
    assert isinstance(model, TeacherStudent) == (opts is NOT_YET)
    inputs = batch()
    expected, losses = trained_step(plain, inputs), trained_step(model, inputs)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[k], expected[k]) for k in expected)
    wanted, got = gradients(plain), gradients(ours)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[k], got[k]) for k in wanted)
    state = ours.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("student", STUDENTS)
def test_detection_losses_are_detectron2s_while_distilling(tmp_path, student):
    plain = detector(STUDENTS[student], seed=3)
    model = seeded_model(distill_config(tmp_path, student))
    inputs = batch()
    expected, losses = trained_step(plain, inputs), trained_step(model, inputs)
    assert all(torch.equal(losses[k], expected[k]) for k in expected)
    assert set(losses) - set(expected) == {"loss_frs_feature", "loss_frs_cls"}
    assert not any(m._forward_hooks for m in model.student.modules()), "hooks are left behind"


@pytest.mark.parametrize("student", STUDENTS)
def test_same_random_numbers_with_and_without_a_teacher(tmp_path, student):
    states = []
    for opts in ([], KD_OFF):
        seeded_model(distill_config(tmp_path, student, opts))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("student", STUDENTS)
def test_evaluation_is_the_student(tmp_path, student):
    model = build_model(distill_config(tmp_path, student)).eval()
    inputs = [{k: v for k, v in x.items() if k != "instances"} for x in batch()]
    with torch.no_grad():
        ours, plain = model(inputs), model.student(inputs)
    for a, b in zip(ours, plain):
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


@pytest.mark.parametrize("student", STUDENTS)
def test_one_pass_each(tmp_path, student):
    model = build_model(distill_config(tmp_path, student))
    teacher = model.teacher.detector
    calls = []

    def count(name, module):
        module.register_forward_hook(lambda *_: calls.append(name))

    for who, net in (("student", model.student), ("teacher", teacher)):
        count(f"{who} backbone", net.backbone)
        count(f"{who} stages", net.backbone.bottom_up)
    head = model.teacher.family.dense_head.module
    count("teacher head", head)
    if student == "FasterRCNN":
        count("teacher RoI heads", teacher.roi_heads)
        count("teacher box head", teacher.roi_heads.box_head)
    step(model, batch())
    assert sorted(calls) == [
        "student backbone",
        "student stages",
        "teacher backbone",
        "teacher head",
        "teacher stages",
    ]
    # While nothing of the student is in memory
    assert calls.index("teacher backbone") < calls.index("student stages")


def test_a_teacher_that_nobody_asks_is_not_run(tmp_path):
    model = build_model(distill_config(tmp_path, "FCOS", NOT_YET))
    model.teacher.detector.backbone.register_forward_hook(lambda *_: pytest.fail("teacher ran"))
    step(model, batch())


@pytest.mark.parametrize("student", STUDENTS)
def test_teacher_stays_as_it_was(tmp_path, student):
    model = build_model(distill_config(tmp_path, student))
    teacher = model.teacher.detector
    before = checksum(teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(2):
        model.train()
        sum(step(model, batch(seed=i)).values()).backward()
        optimizer.step()
    model.train(False).train(True)
    assert checksum(teacher) == before
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    ids = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in ids for p in model.parameters())
    assert not any("teacher" in name for name in model.state_dict())


@pytest.mark.parametrize("student", STUDENTS)
def test_saved_student_fills_a_plain_detector(tmp_path, student):
    model = build_model(distill_config(tmp_path, student))
    DetectionCheckpointer(model.student, str(tmp_path), distillers=model.distillers).save("m")
    saved = torch.load(tmp_path / "m.pth", weights_only=True)
    plain = detector(STUDENTS[student], seed=9)
    assert saved["model"].keys() == plain.state_dict().keys()
    extra = DetectionCheckpointer(plain).load(str(tmp_path / "m.pth"))
    assert set(extra) == {"distillers"}
    assert checksum(plain) == checksum(model.student)


BOXES = {
    "no objects": [[], []],
    "one pixel": [[[5, 5, 6, 6]], [[0, 0, 1, 1]]],
    "on the border": [[[0, 0, 128, 96]], [[90, 70, 100, 80], [0, 0, 100, 80]]],
    "zero size": [[[7, 7, 7, 7]], []],
}


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("student", STUDENTS)
def test_finite_and_differentiable(tmp_path, student, boxes):
    model = build_model(distill_config(tmp_path, student))
    losses = step(model, batch(boxes=boxes))
    distilled = {k: v for k, v in losses.items() if "frs" in k}
    assert len(distilled) == 2 and all(torch.isfinite(v) for v in distilled.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(g).all() for g in gradients(model.distillers).values())


@pytest.mark.parametrize("student", STUDENTS)
def test_every_parameter_gets_a_gradient_in_every_step(tmp_path, student):
    """DistributedDataParallel without a search for unused parameters needs this."""
    for opts in ([], NOT_YET, NOT_YET[:2]):
        model = build_model(distill_config(tmp_path, student, opts))
        sum(step(model, batch()).values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_recipe_in_stock_detectron2_is_the_student(tmp_path):
    cfg = distill_config(tmp_path, "RetinaNet")
    assert cfg.MODEL.META_ARCHITECTURE == config(STUDENTS["RetinaNet"]).MODEL.META_ARCHITECTURE

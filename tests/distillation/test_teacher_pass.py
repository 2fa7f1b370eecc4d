"""The teacher runs no further than what is read of it, with equal outputs."""

import pytest
import torch
from toys import STUDENTS, batch, detector, distill_config, step

from d2kd.distillation import build_model
from d2kd.distillation.rebuild import Options, rebuild
from d2kd.distillation.teacher import Teacher, TeacherPass
from d2kd.views import build_family
from d2kd.views.reads import Dense, Features, Stage

DENSE = ("RetinaNet", "FCOS", "ATSS", "GFL")


def run_of(model):
    """Names of the teacher's modules that run in a step of training."""
    names = set()
    for name, module in model.teacher.detector.named_modules():
        module.register_forward_hook(lambda *_, name=name: names.add(name))
    step(model, batch())
    return names


def pass_of(name, reads):
    """The teacher's view of a batch."""
    teacher_detector, student = detector(STUDENTS[name]), detector(STUDENTS[name])
    torch.nn.init.normal_(teacher_detector.head.bbox_pred.weight)
    formats = {"input_format": "BGR", "student_format": "BGR"}
    teacher = Teacher(teacher_detector, student=student, **formats)
    inputs = [{"image": x["image"]} for x in batch()]
    teacher_pass = TeacherPass(teacher, inputs, reads)
    teacher_pass.run_backbone(build_family(student).preprocess(inputs).tensor)
    return teacher_pass.finish([])


def test_stages_alone_need_no_fpn(tmp_path):
    names = run_of(build_model(distill_config(tmp_path, "RetinaNet", methods=["HGD"])))
    assert "backbone.bottom_up" in names
    assert not any("fpn" in name or name.startswith("head") for name in names)


@pytest.mark.parametrize(
    "student, method, runs, rests",
    [
        ("RetinaNet", "FRS", "head.cls_score", ("head.bbox_subnet.0", "head.bbox_pred")),
        ("FCOS", "FRS", "head.cls_score", ("head.bbox_subnet.0", "head.bbox_pred", "head.ctrness")),
        ("GFL", "LD", "head.bbox_pred", ("head.cls_subnet.0", "head.cls_score")),
    ],
)
def test_a_branch_that_nobody_reads_does_not_run(tmp_path, student, method, runs, rests):
    names = run_of(build_model(distill_config(tmp_path, student, methods=[method])))
    assert runs in names and names.isdisjoint(rests)


@pytest.mark.parametrize(
    "method, depth", [("CrossKD", ["DISTILL.CROSSKD.DEPTH", 1]), ("Mimicking", [])]
)
def test_without_a_box_loss_the_box_branch_does_not_run(tmp_path, method, depth):
    opts = [f"DISTILL.{method.upper()}.BBOX.WEIGHT", 0.0, *depth]
    cfg = distill_config(tmp_path, "RetinaNet", opts, methods=[method])
    names = run_of(build_model(cfg))
    assert "head.cls_score" in names
    assert names.isdisjoint(("head.bbox_subnet.0", "head.bbox_pred"))


def test_what_another_method_reads_runs(tmp_path):
    names = run_of(build_model(distill_config(tmp_path, "FCOS", methods=["FRS", "Mimicking"])))
    assert {"head.cls_score", "head.bbox_pred", "head.ctrness"} <= names


@pytest.mark.parametrize(
    "student, output",
    [(student, output) for student in DENSE for output in ("logits", "deltas")]
    + [("FCOS", "centerness"), ("ATSS", "centerness")],
)
def test_one_branch_gives_what_the_whole_head_does(student, output):
    torch.manual_seed(0)
    whole = pass_of(student, [Features(), Dense(), Dense((output,))]).predictions
    torch.manual_seed(0)
    alone = pass_of(student, [Features(), Dense((output,))]).predictions
    expected = getattr(whole, output)
    assert [x is None for x in alone] == [name != output for name in alone._fields]
    assert all(torch.equal(a, b) for a, b in zip(getattr(alone, output), expected))


def test_nothing_is_read_and_nothing_is_rebuilt():
    teacher, student = (detector(STUDENTS["FCOS"]) for _ in range(2))
    formats = {"input_format": "BGR", "student_format": "BGR"}
    teacher = Teacher(teacher, student=student, **formats)
    assert rebuild(teacher, build_family(student), [], Options()) == ""


def test_stages_beside_the_fpn_are_those_of_the_whole_backbone():
    reads = [Stage("res3"), Stage("res4", pre_activation=True)]
    maps = []
    for more in ([], [Features()]):
        torch.manual_seed(0)
        view = pass_of("RetinaNet", [*reads, *more])
        maps.append([view.stage(read) for read in reads])
    assert all(torch.equal(a, b) for a, b in zip(*maps))


@pytest.mark.parametrize("iteration, drawn", [(0, True), (1, False), (2, True)])
def test_detectron2_draws_the_ground_truth_that_was_given(tmp_path, iteration, drawn):
    """It cannot draw boxes that are on a GPU."""
    model = build_model(distill_config(tmp_path, "FasterRCNN", ["VIS_PERIOD", 2]))
    inputs, seen = batch(), []
    model.student.register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    step(model, inputs, iteration)
    same = [ours["instances"] is x["instances"] for ours, x in zip(seen, inputs)]
    assert same == [drawn] * len(inputs)

"""What methods on dense predictions refuse, and what they take."""

import glob
import os

import pytest
import torch
from crosskd_cases import distilled, original_batch, small_pair
from detectron2.modeling.box_regression import Box2BoxTransform
from toys import batch, config, distill_config, step

from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.model_zoo import CONFIG_DIRS

METHODS = ("CrossKD", "Mimicking")
RECIPES = sorted(
    os.path.relpath(path, folder)
    for folder in CONFIG_DIRS
    for method in METHODS
    for path in glob.glob(os.path.join(folder, "shapes", method.lower(), "*.yaml"))
)

# With these, nothing but the centerness tells a RetinaNet from an ATSS
ANCHORS_OF_ATSS = ["MODEL.ANCHOR_GENERATOR.SIZES", [[8.0 * s] for s in (8, 16, 32, 64, 128)]]
ANCHORS_OF_ATSS += ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]]


def refusal(tmp_path, student, opts=(), method="CrossKD", **kwargs):
    """The one line that a user reads."""
    opts = ["DISTILL.CROSSKD.DEPTH", 1, *opts]
    with pytest.raises(UserError) as error:
        build_model(distill_config(tmp_path, student, opts, methods=(method,), **kwargs))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("method", METHODS)
def test_refuses_a_teacher_with_another_head(tmp_path, method):
    key = f"DISTILL.{method.upper()}"
    classes = ["MODEL.RETINANET.NUM_CLASSES", 4]
    message = refusal(tmp_path, "RetinaNet", teacher_opts=classes, method=method)
    for part in (key, "NUM_CLASSES", "is 6 of the student", "4 of the teacher"):
        assert part in message
    anchors = ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]]
    message = refusal(tmp_path, "RetinaNet", teacher_opts=anchors, method=method)
    assert "MODEL.ANCHOR_GENERATOR" in message and "is 9 of" in message and "and 3 of" in message
    message = refusal(tmp_path, "GFL", teacher_opts=["MODEL.GFL.REG_MAX", 8], method=method)
    assert "REG_MAX" in message and "is 16 of" in message and "and 8 of" in message
    levels = ["MODEL.FCOS.IN_FEATURES", ["p3", "p4", "p5"]]
    message = refusal(tmp_path, "FCOS", teacher_opts=levels, method=method)
    assert "IN_FEATURES" in message and "[8, 16, 32, 64, 128]" in message
    assert "[8, 16, 32] of the teacher" in message


@pytest.mark.parametrize("method", METHODS)
def test_refuses_another_kind_of_detector(tmp_path, method):
    message = refusal(tmp_path, "RetinaNet", teacher="GFL", method=method)
    assert "is deltas of the student" in message and "distribution of the teacher" in message
    for pair in ({"student": "RetinaNet", "teacher": "FasterRCNN"}, {"student": "FasterRCNN"}):
        message = refusal(tmp_path, method=method, **pair)
        assert f"DISTILL.{method.upper()}" in message and "GeneralizedRCNN" in message


def test_refuses_a_depth_outside_the_towers(tmp_path):
    key = "DISTILL.CROSSKD.DEPTH"
    assert f"{key} is -1: give 0 or more" in refusal(tmp_path, "FCOS", [key, -1])
    message = refusal(tmp_path, "FCOS", [key, 3])
    assert f"{key} is 3" in message and "of the student" in message and "has 2 blocks" in message
    message = refusal(tmp_path, "FCOS", [key, 3, "MODEL.FCOS.NUM_CONVS", 4])
    assert f"{key} is 3" in message and "of the teacher" in message and "has 2 blocks" in message


def test_the_depth_was_called_tap(tmp_path):
    message = refusal(tmp_path, "FCOS", ["DISTILL.CROSSKD.TAP", 1])
    assert "DISTILL.CROSSKD.TAP is now called DISTILL.CROSSKD.DEPTH" in message


def test_refuses_losses_that_the_head_cannot_have(tmp_path):
    key = "DISTILL.CROSSKD.BBOX_LOSS"
    assert f"{key} is 'glou': did you mean 'giou'" in refusal(tmp_path, "FCOS", [key, "glou"])
    assert f"{key} is 'kl'" in refusal(tmp_path, "FCOS", [key, "kl"])
    centerness = "DISTILL.CROSSKD.CENTERNESS.WEIGHT"
    message = refusal(tmp_path, "GFL", [centerness, 1.0])
    assert f"teacher: GFL predicts no centerness; set {centerness} to 0" in message
    assert "CROSSKD.BETA is 0.5" in refusal(tmp_path, "GFL", ["DISTILL.CROSSKD.BETA", 0.5])
    cold = ["DISTILL.MIMICKING.TEMPERATURE", 0.0]
    assert "MIMICKING.TEMPERATURE is 0.0" in refusal(tmp_path, "GFL", cold, "Mimicking")


@pytest.mark.parametrize("method", METHODS)
def test_refuses_a_teacher_without_centerness(tmp_path, method):
    key = f"DISTILL.{method.upper()}.CENTERNESS.WEIGHT"
    pair = {"teacher": "RetinaNet", "teacher_opts": ANCHORS_OF_ATSS, "method": method}
    message = refusal(tmp_path, "ATSS", [key, 1.0], **pair)
    assert f"{key} is not 0, but this term reads dense centerness of the teacher:" in message


def test_a_student_without_centerness_learns_it_through_the_teachers_head(tmp_path):
    """CrossKD compares no prediction of the student's own head; mimicking does."""
    opts = [*ANCHORS_OF_ATSS, "DISTILL.CROSSKD.CENTERNESS.WEIGHT", 1.0, "DISTILL.CROSSKD.DEPTH", 1]
    cfg = distill_config(tmp_path, "RetinaNet", opts, teacher="ATSS", methods=("CrossKD",))
    assert step(build_model(cfg), batch())["loss_crosskd_centerness"] > 0
    opts = [*ANCHORS_OF_ATSS, "DISTILL.MIMICKING.CENTERNESS.WEIGHT", 1.0]
    message = refusal(tmp_path, "RetinaNet", opts, "Mimicking", teacher="ATSS")
    assert "of the student: RetinaNet predicts no centerness" in message


def test_teacher_and_student_may_differ_in_width_and_depth(tmp_path):
    opts = ["MODEL.FPN.OUT_CHANNELS", 96, "MODEL.ATSS.NUM_CONVS", 3]
    cfg = distill_config(
        tmp_path, "ATSS", ["DISTILL.CROSSKD.DEPTH", 2], teacher_opts=opts, methods=("CrossKD",)
    )
    model = build_model(cfg)
    losses = step(model, batch())
    sum(losses.values()).backward()
    for adapter in model.distillers["CrossKD"].adapters.values():
        assert adapter.weight.shape == (96, 64, 1, 1) and adapter.weight.grad.norm() > 0


@pytest.mark.parametrize("loss", ["iou", "giou", "kl"])
def test_any_box_loss_for_distributions(tmp_path, loss):
    opts = ["DISTILL.CROSSKD.DEPTH", 1, "DISTILL.CROSSKD.BBOX_LOSS", loss]
    model = build_model(distill_config(tmp_path, "GFL", opts, methods=("CrossKD",)))
    value = step(model, batch())["loss_crosskd_bbox"]
    value.backward()
    assert torch.isfinite(value) and value > 0


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("method", METHODS)
def test_the_head_that_predicts_a_box_decodes_it(method, side):
    """Where it predicts deltas of another size, and decodes them so, the boxes are the same."""
    losses = []
    for size in (1.0, 4.0):
        pair = small_pair("retinanet")
        pair[side].box2box_transform = Box2BoxTransform(weights=(size,) * 4)
        for parameter in pair[side].head.bbox_pred.parameters():
            parameter.data.mul_(size)
        terms = step(distilled("retinanet", *pair, method=method), original_batch())
        losses.append(terms[f"loss_{method.lower()}_bbox"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_there_is_a_recipe_for_every_dense_detector():
    assert len([name for name in RECIPES if name.endswith("_tiny.yaml")]) == 10


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_compares_what_the_released_config_does(recipe):
    """Centerness with ATSS alone."""
    cfg = config(recipe)
    (method,) = cfg.DISTILL.METHODS
    terms = DISTILLER_REGISTRY.get(method).enabled_terms(cfg.DISTILL[method.upper()])
    centerness = ("centerness",) if "atss" in recipe else ()
    assert terms == ("cls", "bbox", *centerness)

"""What methods on dense predictions refuse, and a training step of every shipped recipe."""

import glob
import os

import pytest
import torch
from toys import batch, config, distill_config, step

from d2kd.errors import UserError
from d2kd.model_zoo import CONFIG_DIRS
from d2kd.modeling import build_model

METHODS = ("CrossKD", "Mimicking")
RECIPES = sorted(
    os.path.join("shapes", os.path.basename(path))
    for folder in CONFIG_DIRS
    for method in METHODS
    for path in glob.glob(os.path.join(folder, "shapes", f"{method.lower()}_*.yaml"))
)


def refusal(tmp_path, student, opts=(), method="CrossKD", **kwargs):
    """The one line that a user reads."""
    tap = ["DISTILL.CROSSKD.TAP", 1]
    cfg = distill_config(tmp_path, student, [*tap, *opts], methods=(method,), **kwargs)
    with pytest.raises(UserError) as error:
        build_model(cfg)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("method", METHODS)
def test_refuses_a_teacher_with_another_head(tmp_path, method):
    key = f"DISTILL.{method.upper()}"
    classes = ["MODEL.RETINANET.NUM_CLASSES", 4]
    message = refusal(tmp_path, "RetinaNet", teacher_opts=classes, method=method)
    for part in (key, "RETINANET.NUM_CLASSES", "is 6 of the student", "4 of the teacher"):
        assert part in message
    anchors = ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]]
    message = refusal(tmp_path, "RetinaNet", teacher_opts=anchors, method=method)
    assert "MODEL.ANCHOR_GENERATOR" in message and "is 9 of" in message and "and 3 of" in message
    message = refusal(tmp_path, "GFL", teacher_opts=["MODEL.GFL.REG_MAX", 8], method=method)
    assert "MODEL.GFL.REG_MAX" in message and "is 16 of" in message and "and 8 of" in message
    levels = ["MODEL.FCOS.IN_FEATURES", ["p3", "p4", "p5"]]
    message = refusal(tmp_path, "FCOS", teacher_opts=levels, method=method)
    assert "MODEL.FCOS.IN_FEATURES" in message and "[8, 16, 32, 64, 128]" in message
    assert "[8, 16, 32] of the teacher" in message


@pytest.mark.parametrize("method", METHODS)
def test_refuses_another_kind_of_detector(tmp_path, method):
    message = refusal(tmp_path, "RetinaNet", teacher="GFL", method=method)
    assert "RetinaNet of the student" in message and "GFL of the teacher" in message
    for pair in ({"student": "RetinaNet", "teacher": "FasterRCNN"}, {"student": "FasterRCNN"}):
        message = refusal(tmp_path, method=method, **pair)
        assert f"DISTILL.{method.upper()}" in message and "GeneralizedRCNN" in message


@pytest.mark.parametrize("tap", [-1, 3])
def test_refuses_a_tap_outside_the_towers(tmp_path, tap):
    message = refusal(tmp_path, "FCOS", ["DISTILL.CROSSKD.TAP", tap])
    assert f"DISTILL.CROSSKD.TAP is {tap}" in message and "have 2 blocks" in message
    if tap > 0:
        deep = ["DISTILL.CROSSKD.TAP", tap, "MODEL.FCOS.NUM_CONVS", 4]
        assert "of the teacher" in refusal(tmp_path, "FCOS", deep)


def test_refuses_losses_that_the_head_cannot_have(tmp_path):
    key = "DISTILL.CROSSKD.BBOX_LOSS"
    assert f"{key} is 'glou': did you mean 'giou'" in refusal(tmp_path, "FCOS", [key, "glou"])
    assert f"{key} is 'kl'" in refusal(tmp_path, "FCOS", [key, "kl"])
    centerness = ["DISTILL.CROSSKD.CENTERNESS.WEIGHT", 1.0]
    assert "CENTERNESS.WEIGHT is 1.0" in refusal(tmp_path, "GFL", centerness)
    assert "CROSSKD.BETA is 0.5" in refusal(tmp_path, "GFL", ["DISTILL.CROSSKD.BETA", 0.5])
    cold = ["DISTILL.MIMICKING.TEMPERATURE", 0.0]
    assert "MIMICKING.TEMPERATURE is 0.0" in refusal(tmp_path, "GFL", cold, "Mimicking")


def test_teacher_and_student_may_differ_in_width_and_depth(tmp_path):
    opts = ["MODEL.FPN.OUT_CHANNELS", 96, "MODEL.ATSS.NUM_CONVS", 3]
    cfg = distill_config(
        tmp_path, "ATSS", ["DISTILL.CROSSKD.TAP", 2], teacher_opts=opts, methods=("CrossKD",)
    )
    model = build_model(cfg)
    losses = step(model, batch())
    sum(losses.values()).backward()
    for adapter in model.distillers["CrossKD"].adapters.values():
        assert adapter.weight.shape == (96, 64, 1, 1) and adapter.weight.grad.norm() > 0


@pytest.mark.parametrize("loss", ["iou", "giou", "kl"])
def test_any_box_loss_for_distributions(tmp_path, loss):
    opts = ["DISTILL.CROSSKD.TAP", 1, "DISTILL.CROSSKD.BBOX_LOSS", loss]
    model = build_model(distill_config(tmp_path, "GFL", opts, methods=("CrossKD",)))
    value = step(model, batch())["loss_crosskd_bbox"]
    value.backward()
    assert torch.isfinite(value) and value > 0


def test_half_precision(tmp_path):
    opts = ["DISTILL.CROSSKD.TAP", 1]
    model = build_model(distill_config(tmp_path, "GFL", opts, methods=METHODS))
    expected = step(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(model, batch())
    sum(losses.values()).backward()
    for name in (k for k in losses if "kd" in k or "mimicking" in k):
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=0.1)


def test_there_is_a_recipe_for_every_dense_detector():
    assert len(RECIPES) == 10


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_a_shipped_recipe(tmp_path, recipe):
    cfg = config(recipe)
    teacher = os.path.join(tmp_path, "teacher.pth")
    torch.save({"model": build_model(config(cfg.DISTILL.TEACHER.CONFIG)).state_dict()}, teacher)
    model = build_model(config(recipe, ["DISTILL.TEACHER.WEIGHTS", teacher]))
    losses = step(model, batch())
    distilled = {k: v for k, v in losses.items() if "kd" in k or "mimicking" in k}
    assert len(distilled) == (3 if "atss" in recipe else 2)
    assert all(torch.isfinite(v) and v > 0 for v in distilled.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

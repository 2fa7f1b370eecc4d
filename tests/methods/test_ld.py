"""LD: its loss by value and gradient, the main region, and the pairs that it refuses."""

import math

import pytest
import torch
from crosskd_cases import array
from toys import batch, distill_config, step

from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.methods.ld import localization_distillation, main_region_weights


def naive_loss(x, z, weight, num_anchors, temperature):
    """Images, locations, anchors, sides and bins one by one; weight is (N, h·w·A)."""
    (n, channels, h, w), total = x.shape, 0.0
    bins = channels // num_anchors // 4
    for i in range(n):
        for anchor in range(h * w * num_anchors):
            cell, a = divmod(anchor, num_anchors)
            row, column = divmod(cell, w)
            for side in range(4):
                start = (a * 4 + side) * bins
                values = [y[i, start : start + bins, row, column].tolist() for y in (x, z)]
                p, q = ([math.exp(v / temperature) for v in logits] for logits in values)
                p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
                divergence = sum(b * math.log(b / a) for a, b in zip(p, q))
                total += float(weight[i, anchor]) * temperature**2 * divergence / bins / 4
    return total / n


def random_case(num_anchors=1, bins=5, dtype=torch.double):
    torch.manual_seed(0)
    x, z = (3 * torch.randn(2, num_anchors * 4 * bins, 2, 3, dtype=dtype) for _ in range(2))
    return x, z, torch.rand(2, 6 * num_anchors, dtype=dtype)


@pytest.mark.parametrize("num_anchors", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_equals_a_naive_loop(num_anchors, temperature):
    x, z, weight = random_case(num_anchors)
    loss = localization_distillation(x, z, weight, num_anchors, temperature)
    expected = naive_loss(x, z, weight, num_anchors, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_equals_the_original_at_its_own_values():
    """T = 10, the mean over bins, weight 0.25, of the 4 sides of two locations of one image."""
    x, z = (
        array(f"ldkl/{side}_logits").reshape(2, 68).t().reshape(1, 68, 1, 2)
        for side in ("pred", "teacher")
    )
    loss = localization_distillation(x, z, torch.ones(1, 2), 1, 10.0) / 2  # theirs: mean over all
    assert torch.allclose(0.25 * loss, array("ldkl/loss_T10_mean_lw0p25_noavg"), rtol=1e-9)


def test_of_one_anchor_is_as_computed_by_hand():
    """Two bins. One side: (1/2, 1/2) of the student, (3/4, 1/4) of the teacher; the others agree.
    T = 2, so the logit of the teacher's first bin is 2 log 3."""
    x, z = torch.zeros(1, 8, 1, 1), torch.zeros(1, 8, 1, 1)
    z[0, 0] = 2 * math.log(3)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    loss = localization_distillation(x, z, torch.full((1, 1), 0.3), 1, 2.0)
    assert loss.item() == pytest.approx(0.3 * 4 * divergence / 2 / 4, rel=1e-6)


def test_equal_distributions_are_zero_whatever_the_logits_add():
    x, _, weight = random_case()
    loss = localization_distillation(x, x + 7, weight, 1, 10.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_images_of_a_batch_are_averaged():
    x, z, weight = random_case()
    whole = localization_distillation(x, z, weight, 1, 10.0)
    parts = [
        localization_distillation(a, b, c, 1, 10.0)
        for a, b, c in zip(*[y.split(1) for y in (x, z, weight)])
    ]
    assert torch.allclose(whole, torch.stack(parts).mean())


def test_gradient():
    x, z, weight = random_case(num_anchors=2, bins=3)
    assert torch.autograd.gradcheck(
        lambda y: localization_distillation(y, z, weight, 2, 10.0), x.requires_grad_()
    )


def test_only_the_student_gets_a_gradient():
    x, z, weight = (y.requires_grad_() for y in random_case())
    localization_distillation(x, z, weight.detach(), 1, 10.0).backward()
    assert x.grad.norm() > 0 and z.grad is None


def test_an_anchor_counts_by_the_students_highest_class_probability():
    probabilities = torch.tensor([[[0.1, 0.7, 0.2], [0.6, 0.3, 0.5]]])  # (1, h·w, K)
    logits = probabilities.logit().permute(0, 2, 1).reshape(1, 3, 1, 2).requires_grad_()
    positive = torch.tensor([[True, False]])
    weights = main_region_weights(logits, positive, num_anchors=1)
    assert torch.allclose(weights, torch.tensor([[0.7, 0.0]])) and not weights.requires_grad


def test_nothing_outside_of_the_main_region_counts():
    x, z, weight = random_case()
    weight[:, 1:] = 0
    other = z.clone()
    other.flatten(2)[:, :, 1:] += torch.randn(2, 20, 5)
    losses = [localization_distillation(x.requires_grad_(), y, weight, 1, 10.0) for y in (z, other)]
    assert torch.equal(*losses)
    losses[0].backward()
    assert (x.grad.flatten(2)[:, :, 1:] == 0).all() and (x.grad.flatten(2)[:, :, 0] != 0).any()


def test_the_method_is_the_formula_on_the_anchors_that_learn_objects(tmp_path):
    model = build_model(distill_config(tmp_path, "GFL", methods=("LD",)))
    inputs = batch()
    loss = step(model, inputs)["loss_ld_bbox"]
    student, teacher = model.student, model.teacher.detector
    features = student.backbone(student.preprocess_image(inputs).tensor)
    levels = [features[name] for name in student.head_in_features]
    logits, deltas = student.head(levels)
    with torch.no_grad():
        theirs = teacher.backbone(teacher.preprocess_image(inputs).tensor)
        _, targets = teacher.head([theirs[name] for name in teacher.head_in_features])
    anchors = student.anchor_generator(levels)
    labels, _ = student.label_anchors(anchors, [x["instances"] for x in inputs])
    labels = torch.stack(labels).split([len(a) for a in anchors], dim=1)
    expected, positives = [], 0
    for c, x, z, label in zip(logits, deltas, targets, labels):
        positive = (label >= 0) & (label < student.num_classes)
        weight = c.sigmoid().amax(dim=1).flatten(1) * positive
        expected.append(naive_loss(x, z, weight.detach(), 1, 10.0))
        positives += int(positive.sum())
    assert positives > 0
    assert model.last_terms["LD", "bbox"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert loss.item() == pytest.approx(0.75 * sum(expected), rel=1e-4)


def test_classes_may_differ(tmp_path):
    opts = ["MODEL.GFL.NUM_CLASSES", 4]
    model = build_model(distill_config(tmp_path, "GFL", teacher_opts=opts, methods=("LD",)))
    assert torch.isfinite(step(model, batch())["loss_ld_bbox"])


@pytest.mark.parametrize(
    "student, teacher, side, form",
    [
        ("RetinaNet", "RetinaNet", "student RetinaNet", "deltas"),
        ("FCOS", "GFL", "student FCOS", "distances"),
        ("ATSS", "GFL", "student ATSS", "deltas"),
        ("GFL", "RetinaNet", "teacher RetinaNet", "deltas"),
        ("GFL", "FasterRCNN", "teacher GeneralizedRCNN", "none"),
    ],
)
def test_refuses_boxes_that_are_no_distributions(tmp_path, student, teacher, side, form):
    message = f"DISTILL.LD compares distributions of box sides, but the {side} predicts {form}: "
    with pytest.raises(UserError, match=message):
        build_model(distill_config(tmp_path, student, teacher=teacher, methods=("LD",)))


def test_refuses_distributions_that_do_not_correspond(tmp_path):
    for opts, parts in (
        (["MODEL.GFL.REG_MAX", 8], ("REG_MAX", "is 16 of the student", "8 of the teacher")),
        (["MODEL.GFL.IN_FEATURES", ["p3", "p4", "p5"]], ("IN_FEATURES", "[8, 16, 32] of the")),
    ):
        with pytest.raises(UserError) as error:
            build_model(distill_config(tmp_path, "GFL", teacher_opts=opts, methods=("LD",)))
        assert all(part in str(error.value) for part in ("DISTILL.LD ", *parts))


def test_refuses_a_temperature_of_zero(tmp_path):
    key = "DISTILL.LD.TEMPERATURE"
    with pytest.raises(UserError, match=f"{key} is 0.0: give a number above 0"):
        distill_config(tmp_path, "GFL", [key, 0.0], methods=("LD",))

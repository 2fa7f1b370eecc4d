"""FRS: the formulas by value and gradient, and what the distiller makes of pairs that differ."""

import os

import numpy as np
import pytest
import torch
from toys import batch, distill_config, step

from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.methods.core import TermSchedule
from d2kd.methods.frs import feature_richness, richness_classification, richness_imitation

REFERENCE = os.path.join(os.environ.get("D2KD_REFERENCE", ""), "frs.npz")
GOLDEN = os.path.join(os.path.dirname(__file__), "golden", "frs.npz")


def load_cases():
    """The original implementation's cases."""
    arrays = dict(np.load(REFERENCE if os.path.isfile(REFERENCE) else GOLDEN))
    tags = sorted({name.split("_alpha_beta")[0] for name in arrays if "_alpha_beta" in name})
    return {tag: {k[len(tag) :]: v for k, v in arrays.items() if k.startswith(tag)} for tag in tags}


CASES = load_cases()


def leaves(case, name):
    """Per-level tensors of a case that want gradients."""
    levels = range(sum(key.startswith("_mask") for key in case))
    return [torch.from_numpy(case[f"_{name}{i}"]).requires_grad_() for i in levels]


@pytest.mark.parametrize("tag", CASES)
def test_equals_the_original_in_values_and_gradients(tag):
    case = CASES[tag]
    alpha, beta, iteration, warmup = case["_alpha_beta_iter_warm"].tolist()
    feats, logits = leaves(case, "s_feat"), leaves(case, "s_logit")
    weights, biases = leaves(case, "adapt_w"), leaves(case, "adapt_b")
    teacher_feats, teacher_logits = leaves(case, "t_feat"), leaves(case, "t_logit")
    centerness = leaves(case, "t_ctr") if "_t_ctr0" in case else [None] * len(feats)

    scores = [feature_richness(z, c) for z, c in zip(teacher_logits, centerness)]
    adapted = [
        torch.nn.functional.conv2d(f, w, b, padding=1) for f, w, b in zip(feats, weights, biases)
    ]
    feature = torch.stack(
        [richness_imitation(a, t, s) for a, t, s in zip(adapted, teacher_feats, scores)]
    )
    cls = torch.stack(
        [richness_classification(z, t, s) for z, t, s in zip(logits, teacher_logits, scores)]
    )
    schedules = {
        "feat": TermSchedule(alpha, max_iter=90000, warmup_iters=int(warmup)),
        "cls": TermSchedule(beta, max_iter=90000, warmup_iters=int(warmup)),
    }
    weighted = {
        "feat": schedules["feat"].apply(feature, int(iteration)),
        "cls": schedules["cls"].apply(cls, int(iteration)),
    }
    for i, score in enumerate(scores):
        assert torch.allclose(score, torch.from_numpy(case[f"_mask{i}"]), rtol=1e-5)
    close = {"rel": 1e-5, "abs": 1e-12}
    assert feature.sum().item() == pytest.approx(float(case["__raw_feat"]), **close)
    assert cls.sum().item() == pytest.approx(float(case["__raw_cls"]), **close)
    assert weighted["feat"].item() == pytest.approx(float(case["__distill_feat_loss"]), **close)
    assert weighted["cls"].item() == pytest.approx(float(case["__distill_cls_loss"]), **close)

    sum(weighted.values()).backward()
    for name, tensors in (("s_feat", feats), ("s_logit", logits), ("adapt_w", weights)):
        for i, tensor in enumerate(tensors):
            expected = torch.from_numpy(case[f"_grad_{name}{i}"])
            scale = expected.abs().max().clamp(min=1e-12)
            assert (tensor.grad - expected).abs().max() <= 1e-5 * scale, (name, i)
    assert all(t.grad is None for t in teacher_feats + teacher_logits)


def test_equals_a_naive_loop():
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 2, 4, dtype=torch.double), torch.randn(2, 3, 2, 4, dtype=torch.double)
    score = torch.rand(2, 2, 4)
    total = 0.0
    for n in range(2):
        for y in range(2):
            for x in range(4):
                for c in range(3):
                    total += float(score[n, y, x] * (s[n, c, y, x] - t[n, c, y, x]) ** 2)
    expected = total / float(score.sum())
    assert richness_imitation(s, t, score).item() == pytest.approx(expected, rel=1e-5)


def test_constant_score_is_the_plain_squared_error():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    loss = richness_imitation(s, t, torch.full((2, 4, 5), 0.3))
    assert torch.allclose(loss, 3 * torch.nn.functional.mse_loss(s, t))


def test_order_of_images_does_not_matter():
    s, t, score = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.rand(3, 4, 4)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(
        richness_imitation(s, t, score), richness_imitation(s[order], t[order], score[order])
    )


def test_finite_with_extreme_logits():
    logits = torch.tensor([-200.0, 200.0, -200.0, -200.0]).reshape(1, 4, 1, 1)
    for z in (logits, torch.full_like(logits, -200.0)):
        student = torch.zeros_like(z, requires_grad=True)
        score = feature_richness(z)
        loss = richness_imitation(student, z, score) + richness_classification(student, z, score)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_sums_are_float32_under_autocast():
    s, t = torch.full((1, 256, 64, 64), 30.0), torch.full((1, 256, 64, 64), -30.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = richness_imitation(s.bfloat16(), t.bfloat16(), torch.ones(1, 64, 64))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(256 * 3600)


def test_nothing_waits_for_the_device():
    """Tensors on the meta device have no values, so anything that waits for them would fail."""
    shapes = [(2, 8, 4, 4)] * 4
    s, t, z_s, z_t = (torch.empty(x, device="meta", requires_grad=True) for x in shapes)
    score = feature_richness(z_t)
    loss = richness_imitation(s, t, score) + richness_classification(z_s, z_t, score)
    TermSchedule(1.0, max_iter=10, warmup_iters=5).apply(loss, 3).backward()


@pytest.mark.parametrize("pair", [("FasterRCNN", "RetinaNet"), ("FCOS", "RetinaNet")])
def test_other_families_teach_features(tmp_path, pair):
    student, teacher = pair
    opts = ["DISTILL.FRS.CLS.WEIGHT", 0.0]
    model = build_model(distill_config(tmp_path, student, opts, teacher=teacher))
    distiller = model.distillers["FRS"]
    # P2...P6 and P3...P7 have four strides in common
    assert distiller.num_levels == (4 if student == "FasterRCNN" else 5)
    losses = step(model, batch())
    assert torch.isfinite(losses["loss_frs_feature"]) and "loss_frs_cls" not in losses


def test_levels_that_both_have_are_compared_whatever_their_number(tmp_path):
    """P4 is the student's first and the teacher's second."""
    sizes = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    key = "MODEL.ANCHOR_GENERATOR.SIZES"
    opts = ["MODEL.RETINANET.IN_FEATURES", ["p4", "p5", "p6", "p7"], key, sizes[1:]]
    model = build_model(distill_config(tmp_path, "RetinaNet", opts, teacher_opts=[key, sizes]))
    assert model.distillers["FRS"].num_levels == 4
    assert torch.isfinite(step(model, batch())["loss_frs_cls"])


def test_a_term_that_is_off_reads_nothing(tmp_path):
    model = build_model(distill_config(tmp_path, "FCOS", ["DISTILL.FRS.CLS.WEIGHT", 0.0]))
    assert set(model.reads) == {("FRS", "feature")}


def test_class_term_refuses_heads_that_differ(tmp_path):
    with pytest.raises(UserError, match="CLS.WEIGHT .* location is 1 .* 9 of the teacher"):
        build_model(distill_config(tmp_path, "FCOS", teacher="RetinaNet"))


def test_centerness_variant(tmp_path):
    opts = ["DISTILL.FRS.CENTERNESS", True]
    said = r"CENTERNESS is True\): RetinaNet predicts no centerness; change DISTILL.FRS.CENTERNESS"
    with pytest.raises(UserError, match=said):
        build_model(distill_config(tmp_path, "RetinaNet", opts))
    inputs = batch()
    values = [
        step(build_model(distill_config(tmp_path, "FCOS", o)), inputs)["loss_frs_feature"].item()
        for o in ([], opts)
    ]
    assert values[0] != values[1]

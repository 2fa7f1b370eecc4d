"""HGD (our reading of the abstract) on detectors: every family, pairs of families, bad configs."""

import logging

import pytest
import torch
from detectron2.utils.events import EventStorage
from toys import STUDENTS, batch, distill_config, step

from d2kd.errors import UserError
from d2kd.modeling import build_model

MOBILENET = ["MODEL.TIMM.NAME", "mobilenetv2_050", "MODEL.TIMM.PRETRAINED", False]


def build(folder, student, opts=(), **kwargs):
    return build_model(distill_config(folder, student, opts, methods=("HGD",), **kwargs))


def hgd(**knobs):
    return [x for name, value in knobs.items() for x in (f"DISTILL.HGD.{name}", value)]


def names(model):
    return [(p.student.name, p.teachers[0].name) for p in model.distillers["HGD"].pairs]


@pytest.mark.parametrize("source", ["backbone", "neck", "both"])
@pytest.mark.parametrize("student", STUDENTS)
def test_loss_reaches_student_and_adapters_but_not_the_teacher(tmp_path, student, source):
    model = build(tmp_path, student, hgd(SOURCE=source, FG_KAPPA=1.0, GAP_GAMMA=1.0))
    before = {k: v.clone() for k, v in model.teacher.detector.state_dict().items()}
    loss = step(model, batch())["loss_hgd_feature"]
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.teacher.detector.parameters())
    after = model.teacher.detector.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("student", STUDENTS)
def test_a_step_of_the_method_never_waits_for_the_gpu(tmp_path, student):
    opts = ["MODEL.DEVICE", "cuda", *hgd(SOURCE="both", FG_KAPPA=1.0, GAP_GAMMA=1.0)]
    model = build(tmp_path, student, opts)
    inputs = batch()
    step(model, inputs)
    seen = {}
    model.distillers["HGD"].register_forward_hook(lambda _, views, __: seen.update(views=views))
    step(model, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.distillers["HGD"](*seen["views"])["feature"].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("student", STUDENTS)
def test_finite_without_objects(tmp_path, student):
    model = build(tmp_path, student, hgd(SOURCE="both", FG_KAPPA=1.0))
    loss = step(model, batch(boxes=[[], []]))["loss_hgd_feature"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "student, teacher, source, pairs",
    [
        ("FCOS", "FasterRCNN", "backbone", [("res3", "res3"), ("res4", "res4"), ("res5", "res5")]),
        # The teacher gives out no res2: the nearest of its stages is res3
        (
            "FasterRCNN",
            "RetinaNet",
            "backbone",
            [("res2", "res3")] + [(f"res{i}",) * 2 for i in (3, 4, 5)],
        ),
        ("FCOS", "FasterRCNN", "neck", [(f"p{i}",) * 2 for i in (3, 4, 5, 6)]),
        ("FasterRCNN", "RetinaNet", "neck", [(f"p{i}",) * 2 for i in (3, 4, 5, 6)]),
    ],
)
def test_pairs_of_families(tmp_path, student, teacher, source, pairs):
    model = build(tmp_path, student, hgd(SOURCE=source), teacher=teacher)
    assert names(model) == pairs and model.distillers["HGD"].num_levels == len(pairs)
    assert torch.isfinite(step(model, batch())["loss_hgd_feature"])


def test_timm_student(tmp_path):
    backbone = ["MODEL.BACKBONE.NAME", "build_timm_fpn_p6p7_backbone", *MOBILENET]
    model = build(tmp_path, "RetinaNet", [*backbone, *hgd(SOURCE="both")], teacher="FasterRCNN")
    stages = [f"res{i}" for i in (2, 3, 4, 5)]
    assert names(model) == [(n, n) for n in [*stages, "p3", "p4", "p5", "p6"]]
    step(model, batch())["loss_hgd_feature"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())


def test_learned_pairing_mixes_all_levels(tmp_path):
    model = build(tmp_path, "FCOS", hgd(SOURCE="neck", PAIRING="learned"), teacher="FasterRCNN")
    assert [len(p.teachers) for p in model.distillers["HGD"].pairs] == [5] * 5
    step(model, batch())["loss_hgd_feature"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.distillers["HGD"].mixing)


def test_order_pairing_counts_from_the_coarsest(tmp_path):
    model = build(tmp_path, "FCOS", hgd(SOURCE="neck", PAIRING="order"), teacher="FasterRCNN")
    assert names(model) == [(f"p{i}", f"p{i - 1}") for i in (3, 4, 5, 6, 7)]
    assert torch.isfinite(step(model, batch())["loss_hgd_feature"])


def test_unpaired_levels_are_averaged(tmp_path):
    opts = hgd(SOURCE="neck", UNPAIRED="average")
    model = build(tmp_path, "FCOS", opts, teacher="FasterRCNN")
    teachers = [[t.name for t in p.teachers] for p in model.distillers["HGD"].pairs]
    assert teachers == [["p3", "p2"], ["p4"], ["p5"], ["p6"]]
    assert torch.isfinite(step(model, batch())["loss_hgd_feature"])


@pytest.mark.parametrize("distance", ["l2", "partial_l2"])
@pytest.mark.parametrize("student", ["RetinaNet", "FasterRCNN"])
def test_stages_before_their_last_relu(tmp_path, student, distance):
    plain = hgd(NORM="none", BETA_S=0.0, BETA_C=0.0, ETA=0.0)
    opts = [*plain, *hgd(TAP="pre_relu", DISTANCE=distance)]
    model, seen = build(tmp_path, student, opts), {}
    method = model.distillers["HGD"]
    method.register_forward_hook(lambda _, views, __: seen.update(views=views))
    loss = step(model, batch([(96, 128)] * 2))["loss_hgd_feature"]
    expected = 0.0
    for adapter, pair in zip(method.adapters, method.pairs):
        ours, theirs = (view.stage_before_relu(pair.student.name) for view in seen["views"][:2])
        assert (theirs < 0).any()
        error = (adapter(ours) - theirs).square()
        if distance == "partial_l2":
            error = torch.where((adapter(ours) <= theirs) & (theirs <= 0), 0.0, error)
        expected = expected + error.mean() / len(method.pairs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert model.student.backbone.bottom_up.res5[-1].conv2.weight.grad.abs().sum() > 0


def test_timm_has_no_stages_before_relu(tmp_path):
    backbone = ["MODEL.BACKBONE.NAME", "build_timm_fpn_p6p7_backbone", *MOBILENET]
    opts = [*backbone, *hgd(TAP="pre_relu", STAGES=["res4"])]
    message = r"^DISTILL.HGD.TAP is 'pre_relu', but res4 of the student \(TimmBackbone\) do"
    with pytest.raises(UserError, match=message):
        build(tmp_path, "RetinaNet", opts, teacher="FasterRCNN")


def test_numbers_of_every_stage_are_logged(tmp_path):
    model = build(tmp_path, "RetinaNet", hgd(SOURCE="both"))
    with EventStorage(19) as storage:
        model(batch())
    logged = {k: v for k, (v, _) in storage.latest().items() if "hgd_feature/" in k}
    assert len(logged) == 4 * 8  # res3 ... res5, p3 ... p7
    assert all(value > 0 for value in logged.values())
    assert all(logged[k] <= 1 for k in logged if k.endswith("on_objects"))


def test_frozen_stages_are_left_out_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model = build(tmp_path, "FasterRCNN", ["MODEL.BACKBONE.FREEZE_AT", 3])
    assert names(model) == [("res4", "res4"), ("res5", "res5")]
    assert "res2, res3 of the student" in caplog.text and "FREEZE_AT is 3" in caplog.text
    caplog.clear()
    build(tmp_path, "FasterRCNN")
    assert "of the student" not in caplog.text


def test_stages_and_level_weights(tmp_path):
    opts = hgd(STAGES=["res4", "p5"], SOURCE="both", ETA=0.0)
    inputs = batch()
    plain = build(tmp_path, "RetinaNet", opts)
    assert names(plain) == [("res4", "res4"), ("p5", "p5")]
    losses = [step(plain, inputs)["loss_hgd_feature"].item()]
    shares = plain.last_terms["HGD", "feature"].tolist()
    weighted = [*opts, "DISTILL.HGD.FEATURE.LEVEL_WEIGHTS", [0.5, 0.0]]
    losses.append(step(build(tmp_path, "RetinaNet", weighted), inputs)["loss_hgd_feature"].item())
    assert losses == pytest.approx([sum(shares), 0.5 * shares[0]])


def test_an_equal_teacher_is_imitated_already(tmp_path):
    no_batch_statistics = ["MODEL.RESNETS.NORM", "FrozenBN"]
    teacher_opts = [*no_batch_statistics, "MODEL.BASIC_RESNET.WIDTH", 8]
    model = build(tmp_path, "FCOS", no_batch_statistics, teacher_opts=teacher_opts)
    model.student.load_state_dict(model.teacher.detector.state_dict())
    assert step(model, batch())["loss_hgd_feature"].item() < 1e-10


@pytest.mark.parametrize(
    "opts, message",
    [
        (hgd(STAGES=["res3", "res6", "p9"]), "STAGES names res6, p9: .* has res3, res4, res5$"),
        (hgd(STAGES=["p3"]), "STAGES names p3: .* has res3, res4, res5$"),
        (
            ["MODEL.BACKBONE.FREEZE_AT", 5],
            "STAGES: res3, res4, res5 .* all frozen: lower MODEL.BACKBONE",
        ),
        (hgd(BETA_S=-1.0, W_MAX=0.5), "BETA_S is -1.0: give 0 to 4; DISTILL.HGD.W_MAX is 0.5"),
        (hgd(ETA=3.0), "ETA is 3.0: give -2 to 2"),
        (hgd(ETA=float("nan")), "ETA is nan"),
        (hgd(GAP_GAMMA=9.0, FG_KAPPA=-1.0), "GAP_GAMMA is 9.0.*FG_KAPPA is -1.0"),
        (hgd(NORM="enrgy"), "NORM is 'enrgy': did you mean 'energy'"),
        (hgd(MACRO="x"), "MACRO is 'x': known: gap, per_image, uncertainty"),
        (hgd(DISTANCE="l3"), "DISTANCE is 'l3'"),
        (hgd(SOURCE="head"), "SOURCE is 'head'"),
        (hgd(TAP="pre"), "TAP is 'pre': known: post_relu, pre_relu"),
        (hgd(UNPAIRED="mean"), "UNPAIRED is 'mean': known: average, drop"),
        (hgd(PAIRING="strides"), "PAIRING is 'strides': did you mean 'stride'"),
        (hgd(PAIRING="learned"), r"PAIRING is 'learned'.* \[32, 64, 128\] channels"),
    ],
)
def test_bad_configs_are_named_in_one_line(tmp_path, opts, message):
    with pytest.raises(UserError, match=f"^DISTILL.HGD.{message}") as error:
        build(tmp_path, "RetinaNet", opts)
    assert "\n" not in str(error.value)

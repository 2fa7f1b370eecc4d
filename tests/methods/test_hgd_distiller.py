"""HGD (our reading of the abstract) on detectors: every family, pairs of families, bad configs."""

import logging

import pytest
import torch
from toys import AS_LOADED, STUDENTS, batch, distill_config, step

from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.views import Features, Stage

MOBILENET = ["MODEL.TIMM.NAME", "mobilenetv2_050", "MODEL.TIMM.PRETRAINED", False]


def build(folder, student, opts=(), **kwargs):
    return build_model(distill_config(folder, student, opts, methods=("HGD",), **kwargs))


def hgd(**knobs):
    return [x for name, value in knobs.items() for x in (f"DISTILL.HGD.{name}", value)]


def names(model):
    return [(p.student.name, p.teachers[0].name) for p in model.distillers["HGD"].pairs]


def called_with(model):
    """A list that gets what the distiller is called with, and what it returns."""
    kept = []
    model.distillers["HGD"].register_forward_hook(lambda _, args, out: kept.extend([*args, out]))
    return kept


@pytest.mark.parametrize("boxes", [None, [[], []]], ids=["objects", "no objects"])
@pytest.mark.parametrize("source", ["neck", "both"])
@pytest.mark.parametrize("student", STUDENTS)
def test_every_micro_weight_trains_student_and_adapters(tmp_path, student, source, boxes):
    model = build(tmp_path, student, hgd(SOURCE=source, FOREGROUND=1.0, GAP_POWER=1.0))
    loss = step(model, batch(boxes=boxes))["loss_hgd_feature"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads)


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
def test_stages_before_their_activation(tmp_path, student, distance):
    plain = hgd(NORM="none", SPATIAL_POWER=0.0, CHANNEL_POWER=0.0, MACRO_POWER=0.0)
    opts = [*plain, *hgd(PRE_ACTIVATION=True, DISTANCE=distance)]
    model = build(tmp_path, student, opts)
    method, seen = model.distillers["HGD"], called_with(model)
    loss = step(model, batch([(96, 128)] * 2))["loss_hgd_feature"]
    expected = 0.0
    for adapter, pair in zip(method.adapters, method.pairs):
        ours, theirs = (view.stage(Stage(pair.student.name, True)) for view in seen[:2])
        assert (theirs < 0).any()
        error = (adapter(ours) - theirs).square()
        if distance == "partial_l2":
            error = torch.where((adapter(ours) <= theirs) & (theirs <= 0), 0.0, error)
        expected = expected + error.mean() / len(method.pairs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert model.student.backbone.bottom_up.res5[-1].conv2.weight.grad.abs().sum() > 0


def test_timm_has_no_stages_before_their_activation(tmp_path):
    backbone = ["MODEL.BACKBONE.NAME", "build_timm_fpn_p6p7_backbone", *MOBILENET]
    opts = [*backbone, *hgd(PRE_ACTIVATION=True, STAGES=["res4"])]
    message = (
        r"^DISTILL.HGD.FEATURE.WEIGHT .* reads res4 before its activation of the student "
        r"\(DISTILL.HGD.PRE_ACTIVATION is True\): res4 of RetinaNet \(TimmBackbone\) does not end "
        r"in .*; change DISTILL.HGD.PRE_ACTIVATION, set DISTILL.HGD.FEATURE.WEIGHT to 0"
    )
    with pytest.raises(UserError, match=message):
        build(tmp_path, "RetinaNet", opts, teacher="FasterRCNN")


@pytest.mark.parametrize("before", [False, True])
def test_what_is_read_follows_from_the_pairs(tmp_path, before):
    """Every stage once, although a teacher's may have several partners; levels have no
    activation."""
    opts = hgd(SOURCE="both", STAGES=["res2", "res3", "p4"], PRE_ACTIVATION=before)
    model = build(tmp_path, "FasterRCNN", opts, teacher="RetinaNet")
    assert names(model) == [("res2", "res3"), ("res3", "res3"), ("p4", "p4")]
    reads = model.reads["HGD", "feature"]
    assert reads.student == (Stage("res2", before), Stage("res3", before), Features())
    assert reads.teacher == (Stage("res3", before), Features())


def test_diagnostics_of_every_stage(tmp_path):
    model = build(tmp_path, "RetinaNet", hgd(SOURCE="both"))
    seen = called_with(model)
    step(model, batch())
    numbers = seen[-1].diagnostics["feature"]()
    assert len(numbers) == 4 * 8  # res3 ... res5, p3 ... p7
    assert all(value > 0 for value in numbers.values())
    assert all(numbers[k] <= 1 for k in numbers if k.endswith("on_objects"))


def test_frozen_stages_are_left_out_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model = build(tmp_path, "FasterRCNN", ["MODEL.BACKBONE.FREEZE_AT", 3])
    assert names(model) == [("res4", "res4"), ("res5", "res5")]
    assert "res2, res3 of the student" in caplog.text and "MODEL.BACKBONE.FREEZE_AT" in caplog.text
    caplog.clear()
    build(tmp_path, "FasterRCNN")
    assert "of the student" not in caplog.text


def test_stages_and_level_weights(tmp_path):
    opts = hgd(STAGES=["res4", "p5"], SOURCE="both", MACRO_POWER=0.0)
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
    opts = [*AS_LOADED, *no_batch_statistics]
    model = build(tmp_path, "FCOS", opts, teacher_opts=teacher_opts)
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
        (
            hgd(SPATIAL_POWER=-1.0, MAX_WEIGHT=0.5),
            "SPATIAL_POWER is -1.0: give 0 ... 4; DISTILL.HGD.MAX_WEIGHT is 0.5: give 1 ... 1e",
        ),
        (hgd(MACRO_POWER=3.0), "MACRO_POWER is 3.0: give -2 ... 2"),
        (hgd(MACRO_POWER=float("nan")), "MACRO_POWER is nan: give finite"),
        (
            hgd(GAP_POWER=9.0, FOREGROUND=-1.0),
            "GAP_POWER is 9.0: give 0 ... 4; DISTILL.HGD.FOREGROUND is -1.0: give 0 ... 1000",
        ),
        (hgd(NORM="enrgy"), "NORM is 'enrgy': did you mean 'energy'"),
        (hgd(MACRO="x"), "MACRO is 'x': known: gap, per_image, uncertainty"),
        (hgd(DISTANCE="l3"), "DISTANCE is 'l3'"),
        (hgd(SOURCE="head"), "SOURCE is 'head'"),
        (hgd(UNPAIRED="mean"), "UNPAIRED is 'mean': known: average, drop"),
        (hgd(PAIRING="strides"), "PAIRING is 'strides': did you mean 'stride'"),
        (hgd(PAIRING="learned"), r"PAIRING is 'learned'.* \[32, 64, 128\] channels"),
    ],
)
def test_bad_configs_are_named_in_one_line(tmp_path, opts, message):
    with pytest.raises(UserError, match=f"^DISTILL.HGD.{message}") as error:
        build(tmp_path, "RetinaNet", opts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "old, value, new",
    [
        ("BETA_S", 1.0, "SPATIAL_POWER"),
        ("BETA_C", 1.0, "CHANNEL_POWER"),
        ("FG_KAPPA", 1.0, "FOREGROUND"),
        ("ETA", 1.0, "MACRO_POWER"),
        ("GAP_GAMMA", 1.0, "GAP_POWER"),
        ("W_MAX", 9.0, "MAX_WEIGHT"),
        ("TAP", "pre_relu", "PRE_ACTIVATION .'pre_relu' is True"),
    ],
)
def test_renamed_keys_are_refused_with_their_new_name(tmp_path, old, value, new):
    with pytest.raises(UserError, match=f"DISTILL.HGD.{old} is now called DISTILL.HGD.{new}"):
        build(tmp_path, "RetinaNet", hgd(**{old: value}))

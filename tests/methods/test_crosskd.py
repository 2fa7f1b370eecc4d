"""CrossKD: its functions, its losses and its gradients on the four dense detectors."""

import gc
import weakref

import pytest
import torch
from crosskd_cases import (
    DEPTHS,
    END_TO_END,
    LEVELS,
    ORIGINAL_LOSSES,
    ORIGINAL_TERMS,
    WEIGHTS,
    array,
    distilled,
    original_batch,
    original_detector,
    our_parameter,
    random_levels,
    relative_error,
    small_detector,
    small_pair,
)
from crosskd_formulas import cross_losses
from toys import step

from d2kd.distillation.teacher import TeacherPass
from d2kd.methods.crosskd import localization_kd, quality_focal_kd
from d2kd.views import Recorder, StudentView, View
from d2kd.views.families import AnchorTargets

EPS = torch.finfo(torch.float32).eps  # the original adds it to every divisor
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def terms(losses):
    return {k.split("_")[-1]: v for k, v in losses.items() if "crosskd" in k}


# The functions


def test_quality_focal_loss_equals_the_original():
    logits = array("kdqfl/pred_logits").requires_grad_()
    teacher, weight = array("kdqfl/teacher_logits"), array("kdqfl/weight")
    for beta in (1, 2):
        expected = array(f"kdqfl/elementwise_beta{beta}")
        assert torch.allclose(quality_focal_kd(logits, teacher, beta), expected, **TIGHT)
    loss = (quality_focal_kd(logits, teacher) * weight[:, None]).sum() / (3 + EPS)
    assert torch.allclose(loss, array("kdqfl/loss_w_avg3"), **TIGHT)
    loss.backward()
    assert torch.allclose(logits.grad, array("kdqfl/grad_pred_w_avg3"), **TIGHT)
    loss = quality_focal_kd(logits, teacher)
    assert torch.allclose(loss.mean(), array("kdqfl/loss_noweight_mean"), **TIGHT)
    of_fcos = 0.4 * loss.sum() / (2.5 + EPS)
    assert torch.allclose(of_fcos, array("kdqfl/loss_noweight_avg2p5_lw0p4"), **TIGHT)


def test_localization_loss_equals_the_original():
    logits = array("ldkl/pred_logits").requires_grad_()
    teacher, weight = array("ldkl/teacher_logits"), array("ldkl/weight")
    rows = localization_kd(logits, teacher)
    assert torch.allclose(rows, array("ldkl/rowwise_T1_sum"), **TIGHT)
    warm = localization_kd(logits, teacher, temperature=10.0) / 17  # theirs is a mean over bins
    assert torch.allclose(warm, array("ldkl/rowwise_T10_mean"), **TIGHT)
    loss = 4 * (rows * weight).sum() / (4 + EPS)
    assert torch.allclose(loss, array("ldkl/loss_T1_sum_lw4_avg4"), **TIGHT)
    loss.backward()
    assert torch.allclose(logits.grad, array("ldkl/grad_pred"), **TIGHT)


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
def test_gradients_of_the_losses(beta):
    torch.manual_seed(0)
    logits = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: quality_focal_kd(x, teacher.detach(), beta), logits)
    assert torch.autograd.gradcheck(lambda x: localization_kd(x, teacher.detach(), beta), logits)
    (quality_focal_kd(logits, teacher).sum() + localization_kd(logits, teacher).sum()).backward()
    assert teacher.grad is None


def test_losses_are_zero_where_the_predictions_agree():
    logits = torch.randn(6, 5, requires_grad=True)
    quality, localization = quality_focal_kd(logits, logits), localization_kd(logits, logits)
    assert quality.abs().max() == 0 and localization.abs().max() < 1e-6
    (quality.sum() + localization.sum()).backward()
    assert logits.grad.abs().max() < 1e-6


def test_losses_are_finite_with_extreme_logits():
    logits = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[200.0, -200.0, -200.0]])
    (quality_focal_kd(logits, teacher).sum() + localization_kd(logits, teacher).sum()).backward()
    assert torch.isfinite(logits.grad).all()


def test_the_class_loss_gives_no_denormal_gradients():
    logits = torch.linspace(-90, 10, 400).requires_grad_()
    quality_focal_kd(logits, logits.detach() - 1).sum().backward()
    sizes = logits.grad.abs()
    assert ((sizes == 0) | (sizes > 1e-30)).all()
    assert (sizes[logits > -30] > 0).all()


# The whole method against the original

ORIGINAL_CASES = [
    *[(name, "official", []) for name in WEIGHTS],
    ("gfl", "official_idx0", ["DEPTH", 0]),
    ("gfl", "official_idx4", ["DEPTH", 4]),
    ("gfl", "noninplace", ["PRE_ACTIVATION", True]),
    ("retinanet", "noninplace", ["PRE_ACTIVATION", True]),
]
AT_HAND = [
    pytest.param(*case, source)
    for source, arrays in END_TO_END.items()
    for case in ORIGINAL_CASES
    if any(key.startswith(f"e2e/{case[0]}/{case[1]}/") for key in arrays)
]


@pytest.mark.parametrize("name, case, opts, source", AT_HAND)
def test_equals_the_original_end_to_end(name, case, opts, source):
    prefix = f"e2e/{name}/{case}/"
    student, teacher = (original_detector(name, who, source) for who in ("student", "teacher"))
    model = distilled(name, student, teacher, opts)
    losses = step(model, original_batch(source=source))
    for ours, theirs in ORIGINAL_LOSSES[name].items() if case == "official" else ():
        assert relative_error(losses[ours], array(f"{prefix}loss_total/{theirs}", source)) < 1e-4
    losses = terms(losses)
    assert losses.keys() == WEIGHTS[name].keys()
    for term, loss in losses.items():
        theirs = f"{prefix}loss_{{}}/{ORIGINAL_TERMS[term]}"
        assert relative_error(loss, array(theirs.format("total"), source)) < 1e-5
        per_level = array(theirs.format("per_level"), source)
        ours = WEIGHTS[name][term] * model.last_terms["CrossKD", term]
        if per_level.numel() > 1:  # FCOS's is one number
            assert relative_error(ours, per_level) < 1e-5

    sum(losses.values()).backward()
    for i in LEVELS:
        expected = array(f"{prefix}kd_grad_student_fpn_l{i}", source)
        limit = 5e-4 if case == "official_idx0" else 1e-5  # of theirs, 2.5e-4 is rounding
        assert relative_error(student.backbone.levels[i].grad, expected) < limit
    _check_parameters(name, student.head, prefix, END_TO_END[source])


def _check_parameters(name, head, prefix, arrays):
    """The same parameters get a gradient as in the original, of the same norm."""
    parameters = dict(head.named_parameters())
    names, norms = (arrays[f"{prefix}kd_grad_param_{x}"] for x in ("names", "norms"))
    norms = dict(zip(names, norms))
    assert -1 in norms.values()
    for theirs, norm in norms.items():
        ours = our_parameter(str(theirs), with_norm=name != "retinanet").split("[")[0]
        gradient = parameters[ours].grad
        assert (gradient is None) == (norm == -1), theirs
        # What the alignment cancels is 1e-7 of rounding.
        assert gradient is None or gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6)


def test_finds_the_originals_numbers_of_positives():
    batch = original_batch()
    gt = [x["instances"] for x in batch]
    for name, attribute, key in (
        ("gfl", "num_positive", "assign/atss_avg_factor"),
        ("atss", "mean_num_positive", "assign/atss_avg_factor"),
        ("retinanet", "num_positive", "assign/retina_avg_factor"),
        ("fcos", "mean_sum_centerness", "assign/fcos_centerness_targets_pos"),
    ):
        family = distilled(name, *small_pair(name)).family
        assignment = family.assign(family.anchors(random_levels(0)), gt)
        expected = array(key).sum().item()
        assert getattr(assignment, attribute).item() == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("objects", [True, False], ids=["objects", "no objects"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_equals_the_formulas_written_out(name, objects):
    student, teacher = small_pair(name)
    batch = original_batch(objects)
    losses = terms(step(distilled(name, student, teacher), batch))
    expected = cross_losses(name, student, teacher, batch, DEPTHS[name])
    expected = {term: weight * expected[term] for term, weight in WEIGHTS[name].items()}
    assert losses.keys() == expected.keys()
    for term in losses:
        assert losses[term].item() == pytest.approx(expected[term].item(), rel=1e-5), term
    levels = list(student.backbone.levels)
    ours = torch.autograd.grad(sum(losses.values()), levels)
    for a, b in zip(ours, torch.autograd.grad(sum(expected.values()), levels)):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("name, tower", [("atss", "bbox_subnet"), ("fcos", "cls_subnet")])
def test_the_centerness_is_that_of_the_tower_it_stands_on(name, tower):
    """PaperFCOS has it on the class tower."""
    student, teacher = small_pair(name)
    opts = ["CLS.WEIGHT", 0.0, "BBOX.WEIGHT", 0.0, "CENTERNESS.WEIGHT", 1.0]
    losses = terms(step(distilled(name, student, teacher, opts), original_batch()))
    expected = cross_losses(name, student, teacher, original_batch(), DEPTHS[name])
    assert losses.keys() == {"centerness"}
    assert losses["centerness"].item() == pytest.approx(expected["centerness"].item(), rel=1e-5)
    losses["centerness"].backward()
    trained = [n for n, p in student.head.named_parameters() if p.grad is not None]
    assert trained and all(n.startswith(tower) for n in trained)


# Properties


@pytest.mark.parametrize("depth", [0, 2, 4])
@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_stops_where_the_student_hands_over(name, depth):
    student, teacher = small_pair(name)
    model = distilled(name, student, teacher, ["DEPTH", depth])
    sum(terms(step(model, original_batch())).values()).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in student.backbone.levels)
    size = 3 if hasattr(student.head, "scales") else 2
    for parameter_name, parameter in student.head.named_parameters():
        module, index = parameter_name.split(".")[:2] if "." in parameter_name else ("", 0)
        before = module.endswith("subnet") and int(index) < depth * size
        assert (parameter.grad is not None) == before, parameter_name
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(name):
    pair = [small_detector(name, random_levels(5), seed=5) for _ in range(2)]
    losses = terms(step(distilled(name, *pair), original_batch()))
    for term in ("cls", "bbox"):
        assert losses[term].abs() < 1e-2, term  # of 0.03 (FCOS) to 50 (RetinaNet) otherwise


@pytest.mark.parametrize("name", WEIGHTS)
def test_finite_with_levels_of_one_element(name):
    pair = [
        small_detector(name, random_levels(i, images=1, height=64, width=64), i) for i in range(2)
    ]
    batch = original_batch()[:1]
    batch[0]["image"] = torch.zeros(3, 64, 64)
    losses = terms(step(distilled(name, *pair), batch))
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in pair[0].backbone.levels)


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_adapter_is_trained_where_the_widths_differ(name):
    student = small_detector(name, random_levels(0, channels=16), seed=0)
    teacher = small_detector(name, random_levels(1), seed=1)
    if name != "retinanet":  # its norm has 8 groups
        assert student.head.cls_subnet[1].num_channels == 16
    model = distilled(name, student, teacher)
    adapters = model.distillers["CrossKD"].adapters
    assert {b: (a.in_channels, *a.bias.shape) for b, a in adapters.items()} == {
        "cls": (16, 32),
        "bbox": (16, 32),
    }
    sum(terms(step(model, original_batch())).values()).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in adapters.cls.parameters())
    assert len(distilled(name, *small_pair(name)).distillers["CrossKD"].adapters) == 0


def test_boxes_of_a_teacher_that_sees_nothing_have_no_loss():
    student, teacher = small_pair("gfl")
    torch.nn.init.constant_(teacher.head.cls_score.bias, -200.0)  # all weights are 0 in float32
    assert terms(step(distilled("gfl", student, teacher), original_batch()))["bbox"] == 0


def test_only_what_is_wanted_is_computed():
    student, teacher = small_pair("atss")
    model = distilled(
        "atss", student, teacher, ["BBOX.START_ITER", 10**6, "CENTERNESS.WEIGHT", 0.0]
    )
    assert terms(step(model, original_batch())).keys() == {"cls"}
    model = distilled("atss", student, teacher, ["CLS.WEIGHT", 0.0, "BBOX.WEIGHT", 0.0])
    assert terms(step(model, original_batch())).keys() == {"centerness"}


@pytest.mark.parametrize("name", ["atss", "gfl", "fcos"])
def test_one_communication_for_all_terms(monkeypatch, name):
    values = []

    def mean_over_gpus(value):
        values.append(value)
        return 2 * value

    model = distilled(name, *small_pair(name))
    alone = terms(step(model, original_batch()))
    monkeypatch.setattr("d2kd.views.families.assignment.mean_over_gpus", mean_over_gpus)
    together = terms(step(model, original_batch()))
    assert len(values) == 1
    for term in alone:
        factor = 1.0 if (name, term) == ("gfl", "bbox") else 2.0
        assert alone[term].item() == pytest.approx(factor * together[term].item(), rel=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_nothing_waits_for_the_device(name):
    """Tensors on the meta device have no values, so anything that waits for them would fail. What
    the anchors learn is left out: that is the detector's own code."""
    model = distilled(name, *small_pair(name)).to("meta")
    ours, theirs = model.active_reads({"CrossKD": model.distillers["CrossKD"].terms})
    images = torch.zeros(2, 3, 128, 192, device="meta")
    teacher_pass = TeacherPass(model.teacher, original_batch(), theirs)
    teacher_pass.run_backbone(images)
    with Recorder(model.family.observed(ours)) as recorder:
        levels = list(model.student.backbone(images).values())
        model.student.head(levels)
    student = StudentView(model.family, ours, recorder, [(128, 192), (96, 160)], [])
    anchors = model.family.anchors(levels)
    shape = 2, sum(len(x) for x in anchors)
    student.assignment = AnchorTargets(
        sizes=[len(x) for x in anchors],
        centers=torch.zeros(shape[1], 2, device="meta"),
        labels=torch.zeros(shape, dtype=torch.long, device="meta"),
        boxes=torch.zeros(*shape, 4, device="meta"),
        num_classes=5,
    )
    losses = model.distillers["CrossKD"](student, teacher_pass.finish([]), [])
    assert losses.keys() == WEIGHTS[name].keys()
    sum(loss.sum() for loss in losses.values()).backward()


@pytest.mark.parametrize("name, maps", [("gfl", 1), ("retinanet", 0)])
def test_of_the_rest_of_a_tower_only_inputs_of_norms_are_kept(name, maps):
    student, teacher = small_pair(name)
    model = distilled(name, student, teacher)
    kept = []
    features = [x.requires_grad_() for x in random_levels(0)]
    teacher_view = TeacherPass(model.teacher, [], []).finish([])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        teacher_view.resume("cls", 3, features)
    shape = features[0].shape
    assert sum(x.shape == shape and x.dtype == torch.float32 for x in kept) == maps
    assert sum(x.shape == shape and x.dtype == torch.bool for x in kept) == 1


def test_a_step_leaves_nothing_in_memory(monkeypatch):
    kept, read = [], View.tower
    monkeypatch.setattr(
        View, "tower", lambda *a: [kept.append(weakref.ref(x)) or x for x in read(*a)]
    )
    model = distilled("gfl", *small_pair("gfl"))
    gc.disable()
    try:
        sum(step(model, original_batch()).values()).backward()
        assert len(kept) == 20 and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()

"""The feature term of G-DetKD in its variants, by value and by gradient."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from gdetkd_cases import (
    BOXES,
    CKD_OFF,
    KEY,
    SGFI_ALONE,
    calls_of,
    distilled,
    model_of,
    pooled_by_the_student,
    regions_of,
    views_of,
)
from toys import STUDENTS, batch, gradients, step

from d2kd.layers import as_float
from d2kd.methods.gdetkd.imitation import (
    AssignedImitation,
    MaskedImitation,
    SoftImitation,
    TeacherSoftImitation,
)
from d2kd.views import Features, Proposals, Reads, Regions

TEACHER_LEVELS = [KEY + "AGGREGATE", "teacher"]
ASSIGNED, MASKED = [KEY + "MATCH", "assigned"], [KEY + "MATCH", "gt_mask"]
POOLED = Regions(pooled=True)
every_student = pytest.mark.parametrize("name", STUDENTS)


def imitation_and_views(model, sizes=((64, 96),)):
    student, teacher, _ = views_of(model, batch(sizes))
    return model.distillers["GDetKD"].imitation, student, teacher


@pytest.mark.parametrize(
    "opts, kind, teacher_reads",
    [
        ([], SoftImitation, (POOLED,)),
        (TEACHER_LEVELS, TeacherSoftImitation, (Features(),)),
        (ASSIGNED, AssignedImitation, (POOLED,)),
        (MASKED, MaskedImitation, (Features(),)),
    ],
)
def test_every_variant_reads_what_it_takes(tmp_path, opts, kind, teacher_reads):
    model = model_of(tmp_path, "FasterRCNN", [*SGFI_ALONE, *opts])
    assert type(model.distillers["GDetKD"].imitation) is kind
    ours = (Features(),) if kind is MaskedImitation else (Features(), Proposals())
    assert model.reads["GDetKD", "sgfi"] == Reads(ours, teacher_reads)


@pytest.mark.parametrize("opts", [[], TEACHER_LEVELS, ASSIGNED], ids=["soft", "teacher", "one"])
@every_student
def test_features_alone_run_no_box_head_again(tmp_path, name, opts):
    """The teacher's box head never runs, nor does its RPN; the student's runs for its own loss."""
    model = model_of(tmp_path, name, [*SGFI_ALONE, *opts])
    student, teacher = model.student, model.teacher.detector
    modules = {
        "teacher rpn": teacher.proposal_generator.rpn_head,
        "teacher box head": teacher.roi_heads.box_head,
        "teacher predictor": teacher.roi_heads.box_predictor,
    }
    if name == "FasterRCNN":
        modules["student box head"] = student.roi_heads.box_head
    calls = calls_of(modules)
    assert distilled(step(model, batch()))["sgfi"] > 0
    assert calls == (["student box head"] if name == "FasterRCNN" else [])


def pool(view, level, regions):
    """(R, C, r, r) of one level, by Detectron2's pooler."""
    pooler = ROIPooler((7, 7), [1 / level.stride], sampling_ratio=0, pooler_type="ROIAlignV2")
    return pooler([view.features[level.name]], regions.boxes)


def soft_imitation(sgfi, student, regions, target):
    """As the formulas are written: every region is adapted and embedded at every level."""
    adapted = [sgfi.adapter(pool(student, level, regions)) for level in sgfi.levels]
    key = sgfi.embed(target)
    products = [(sgfi.embed(x) * key).sum(dim=(1, 2, 3)) for x in adapted]
    weights = (torch.stack(products) / sgfi.temperature).softmax(dim=0)
    merged = sum(w[:, None, None, None] * x for w, x in zip(weights, adapted))
    return (merged - target).square().mean()


def assert_same_gradients(losses, parameters, tolerance):
    grads = [torch.autograd.grad(x, parameters, retain_graph=True) for x in losses]
    for got, wanted in zip(*grads):
        assert wanted.abs().sum() > 0
        assert torch.allclose(got, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


# Beside ordinary ones: across the border, outside of the image, without area
EDGES = torch.tensor(
    [[-20.0, -9, 30, 40], [80, 50, 130, 90], [300, 200, 350, 260], [9, 9, 9, 9], [5, 5, 4, 40]]
)


@pytest.mark.parametrize("chunk", [128, 3])
@every_student
def test_imitation_is_what_the_formulas_say(tmp_path, name, chunk, monkeypatch):
    """Adapting the weighted sum is adapting every region of every level, for boxes whose pooled
    features are zeros or the border's, too. In float64, as rounding is not the question."""
    monkeypatch.setattr("d2kd.methods.gdetkd.imitation._CHUNK", chunk)
    model = model_of(tmp_path, name, CKD_OFF)
    sgfi, student, teacher = imitation_and_views(model)
    maps = {k: x.detach().double().requires_grad_() for k, x in student.features.items()}
    student = SimpleNamespace(features=maps, precision=nullcontext)
    boxes = torch.cat([BOXES, EDGES])
    target = teacher.regions(regions_of(boxes), POOLED).pooled.double()
    sgfi.double()
    with torch.no_grad():
        sgfi.adapter.bias.normal_()
        sgfi.log_temperature.fill_(-1)

    def loss_of(boxes, target):
        outputs = SimpleNamespace(pooled=target)
        return sgfi(student, SimpleNamespace(regions=lambda *_: outputs), regions_of(boxes))[0]

    loss = loss_of(boxes, target)
    expected = soft_imitation(sgfi, student, regions_of(boxes), target)
    assert len(sgfi.levels) == 5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert_same_gradients((loss, expected), [*sgfi.parameters(), *maps.values()], 1e-9)
    order = torch.randperm(len(boxes))
    assert loss_of(boxes[order], target[order]).item() == pytest.approx(loss.item(), rel=1e-9)


def test_one_level_is_plain_region_imitation(tmp_path):
    model = model_of(tmp_path, "FasterRCNN", [KEY + "LEVELS", ["p3"]])
    sgfi, student, teacher = imitation_and_views(model)
    regions = regions_of(BOXES[:1])
    loss, _ = sgfi(student, teacher, regions)
    pooled = sgfi.adapter(pool(student, sgfi.levels[0], regions))
    target = teacher.regions(regions, POOLED).pooled
    assert loss.item() == pytest.approx((pooled - target).square().mean().item(), rel=1e-5)


def test_assigned_level_is_that_of_the_students_own_box_head(tmp_path):
    """Which it imitates as it is, but for the adapter."""
    model = model_of(tmp_path, "FasterRCNN", ASSIGNED)
    sgfi, student, teacher = imitation_and_views(model, ((96, 128), (80, 100)))
    assert [level.name for level in sgfi.levels] == ["p2", "p3", "p4", "p5"]
    regions = student.proposals(Proposals())
    maps = [as_float(student.features[level.name]) for level in sgfi.levels]
    pooled = sgfi.pooler(maps, regions.boxes)
    assert torch.allclose(pooled, pooled_by_the_student(student, regions))
    loss, numbers = sgfi(student, teacher, regions)
    target = teacher.regions(regions, POOLED).pooled
    expected = (sgfi.adapter(pooled) - target).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and numbers() == {}


def test_weighted_levels_of_the_teacher_equal_a_loop(tmp_path):
    model = model_of(tmp_path, "FasterRCNN", [*CKD_OFF, *TEACHER_LEVELS])
    sgfi, student, teacher = imitation_and_views(model)
    loss, _ = sgfi(student, teacher, regions_of(BOXES))
    assert [level.name for level in sgfi.matched] == ["p2", "p3", "p4", "p5", "p6"]
    assert sgfi.matched == teacher.family.levels
    expected = 0
    for box in BOXES:
        region = regions_of(box[None])
        # What the student's own box head pools: the one level of the box's size
        ours = sgfi.adapter(pooled_by_the_student(student, region))
        theirs = [pool(teacher, level, region) for level in sgfi.matched]
        products = [(sgfi.embed(x) * sgfi.embed(ours)).sum() for x in theirs]
        weights = (torch.stack(products) / sgfi.temperature).softmax(dim=0)
        expected += (sum(w * x for w, x in zip(weights, theirs)) - ours).square().mean() / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    parameters = [*sgfi.parameters(), model.student.backbone.fpn_output2.weight]
    assert_same_gradients((loss, expected), parameters, 1e-4)


def test_one_level_of_the_teacher_is_the_target_itself(tmp_path):
    model = model_of(tmp_path, "RetinaNet", [*CKD_OFF, *TEACHER_LEVELS])
    sgfi, student, teacher = imitation_and_views(model)
    regions = regions_of(BOXES)
    many, one = sgfi.sides(student, teacher, regions)
    pooled = sgfi.level_pooler(many)(regions.rois)
    sgfi.level_pooler = lambda _: lambda _: pooled[:1].expand_as(pooled)
    loss, _ = sgfi(student, teacher, regions)
    assert loss.item() == pytest.approx((one - pooled[0]).square().mean().item(), rel=1e-5)


@every_student
def test_levels_are_pooled_alike_on_every_device(tmp_path, name):
    """A GPU pools one by one, a CPU all at once."""
    sgfi, student, _ = imitation_and_views(model_of(tmp_path, name, CKD_OFF))
    rois = regions_of(torch.cat([BOXES, EDGES[:4]])).rois
    maps = [student.features[level.name] for level in sgfi.matched]
    one_by_one = sgfi.pool_levels(maps, rois)
    torch.testing.assert_close(sgfi.level_pooler(student)(rois), one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opts, levels", [([], range(3, 8)), (TEACHER_LEVELS, range(2, 7))])
def test_diagnostics_are_shares_of_the_levels_that_are_weighted(tmp_path, opts, levels):
    model = model_of(tmp_path, "RetinaNet", [*CKD_OFF, *opts])  # P3 - P7 and P2 - P6
    sgfi, student, teacher = imitation_and_views(model)
    _, diagnostics = sgfi(student, teacher, regions_of(BOXES))
    numbers = diagnostics()
    many, one = sgfi.sides(student, teacher, regions_of(BOXES))
    weights = sgfi.weights(sgfi.level_pooler(many)(regions_of(BOXES).rois), one)
    names = [f"p{k}" for k in levels]
    assert numbers.keys() == {*names, "entropy", "temperature"}
    assert [numbers[x].item() for x in names] == pytest.approx(weights.mean(dim=1).tolist())
    entropy = -(weights * weights.log()).sum(dim=0).mean().item()
    assert numbers["entropy"].item() == pytest.approx(entropy, rel=1e-4)
    assert numbers["temperature"] == 1.0
    assert not any(x.requires_grad for x in numbers.values())


@pytest.mark.parametrize("exponent, temperature", [(-9.0, 0.01), (9.0, 100.0)])
def test_a_temperature_that_left_its_range_comes_back(tmp_path, exponent, temperature):
    model = model_of(tmp_path, "RetinaNet", CKD_OFF)
    sgfi = model.distillers["GDetKD"].imitation
    with torch.no_grad():
        sgfi.log_temperature.fill_(exponent)
    distilled(step(model, batch()))["sgfi"].backward()
    assert sgfi.temperature.item() == pytest.approx(temperature, rel=1e-5)
    assert sgfi.log_temperature.grad != 0


@pytest.mark.parametrize("opts", [[], TEACHER_LEVELS], ids=["student", "teacher"])
def test_the_temperature_alone_is_not_decayed(tmp_path, opts):
    distiller = model_of(tmp_path, "RetinaNet", opts).distillers["GDetKD"]
    assert distiller.no_weight_decay() == {"imitation.log_temperature"}
    assert "imitation.log_temperature" in dict(distiller.named_parameters())
    for others in (ASSIGNED, MASKED):
        assert not model_of(tmp_path, "RetinaNet", others).distillers["GDetKD"].no_weight_decay()


@pytest.mark.parametrize("teacher", ["FasterRCNN", "RetinaNet"])
def test_masked_imitation_by_hand(tmp_path, teacher):
    """A dense teacher teaches this one, too: no regions are taken."""
    model = model_of(tmp_path, "RetinaNet", [*CKD_OFF, *MASKED], teacher=teacher)
    inputs = batch([(64, 64)], boxes=[[[8, 16, 28, 28]]])
    student, taught, _ = views_of(model, inputs)
    sgfi = model.distillers["GDetKD"].imitation
    # Truncated to cells: two of p3, one of p4, one of the coarser levels that both have
    cells = {"p3": [(2, 1), (2, 2)], "p4": [(1, 0)], "p5": [(0, 0)], "p6": [(0, 0)]}
    if teacher == "RetinaNet":
        cells["p7"] = [(0, 0)]
    squared = []
    for name, marked in cells.items():
        difference = sgfi.adapter(student.features[name]) - taught.features[name]
        squared += [difference[0, :, y, x].square().mean() for y, x in marked]
    expected = torch.stack(squared).mean().item()
    assert distilled(step(model, inputs))["sgfi"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name, teacher", [("RetinaNet", "RetinaNet"), ("FCOS", "FasterRCNN")])
def test_masks_take_no_regions(tmp_path, name, teacher):
    """Nor does any of the teacher's heads run."""
    model = model_of(tmp_path, name, [*SGFI_ALONE, *MASKED], teacher=teacher)
    distiller, net = model.distillers["GDetKD"], model.teacher.detector
    heads = {"head": net.head} if teacher == "RetinaNet" else {"head": net.roi_heads.box_head}
    ran = calls_of(heads)
    distiller.regions = lambda *_: ran.append("regions")
    loss = distilled(step(model, batch()))["sgfi"]
    loss.backward()
    assert loss > 0 and not ran
    assert distiller.imitation.adapter.weight.grad.abs().sum() > 0
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


ODD = {
    "no objects": [[], []],
    "one pixel": [[[5, 5, 6, 6]], [[0, 0, 1, 1]]],
    "outside of the padded image": [[[400, 300, 500, 400]], [[100, 80, 128, 96]]],
    "the same box": [[[10, 10, 60, 60]] * 3, []],
}
VARIANTS = {
    "objects alone": [KEY + "FOREGROUND_ONLY", True],
    "teacher's levels": TEACHER_LEVELS,
    "assigned": ASSIGNED,
    "gt_mask": MASKED,
}


@pytest.mark.parametrize("opts", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("boxes", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "FasterRCNN"])
def test_variants_are_finite_and_differentiable(tmp_path, name, boxes, opts):
    model = model_of(tmp_path, name, [*opts, KEY + "POSITIVE_IN_DENOMINATOR", False])
    terms = distilled(step(model, batch(boxes=boxes)))
    assert all(torch.isfinite(term) for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.distillers.parameters())
    assert all(torch.isfinite(g).all() for g in gradients(model).values())

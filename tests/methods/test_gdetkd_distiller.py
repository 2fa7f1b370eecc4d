"""G-DetKD's distiller on every family: what reaches what, what runs, and what is refused."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from toys import STUDENTS, batch, detector, distill_config, gradients, step

from d2kd.methods.distiller import Needs
from d2kd.methods.regions import Regions
from d2kd.modeling import build_model

KEY = "DISTILL.GDETKD."
PREDICTIONS_OFF = [KEY + "CLS.WEIGHT", 0.0, KEY + "BBOX.WEIGHT", 0.0]
SGFI_OFF, CKD_OFF = [KEY + "SGFI.WEIGHT", 0.0], [KEY + "CKD.WEIGHT", 0.0]
SMALL_MEMORY = [KEY + "QUEUE_SIZE", 300]
DENSE = ("RetinaNet", "FCOS", "ATSS", "GFL")
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
CASCADE += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
every_student = pytest.mark.parametrize("name", STUDENTS)


def model_of(folder, name, opts=(), **teacher):
    teacher.setdefault("teacher", "FasterRCNN")
    off = PREDICTIONS_OFF if name in DENSE else []
    opts = [*SMALL_MEMORY, *off, *opts]
    cfg = distill_config(folder, name, opts, methods=["GDetKD"], **teacher)
    torch.manual_seed(3)
    return build_model(cfg)


def distilled(losses):
    return {k[len("loss_gdetkd_") :]: v for k, v in losses.items() if k.startswith("loss_gdetkd_")}


def views_of(model, inputs):
    """What the distiller was called with in one step."""
    kept = []
    handle = model.distillers["GDetKD"].register_forward_hook(lambda m, args, _: kept.append(args))
    step(model, inputs)
    handle.remove()
    return kept[0]


@every_student
def test_terms_reach_student_and_adapters_but_not_the_teacher(tmp_path, name):
    model = model_of(tmp_path, name)
    terms = distilled(step(model, batch()))
    assert set(terms) == {"sgfi", "ckd"} | ({"cls", "bbox"} if name == "FasterRCNN" else set())
    assert all(term > 0 for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.teacher.detector.parameters())


@every_student
def test_forward_passes(tmp_path, name):
    """One pass of each backbone; the teacher's RPN never runs; its box head and the student's run
    once each."""
    model = model_of(tmp_path, name)
    student, teacher = model.student, model.teacher.detector
    modules = {
        "student backbone": student.backbone,
        "teacher backbone": teacher.backbone,
        "teacher rpn": teacher.proposal_generator.rpn_head,
        "teacher box head": teacher.roi_heads.box_head,
    }
    if name == "FasterRCNN":
        modules["student box head"] = student.roi_heads.box_head
    else:
        modules["student head"] = student.head
    calls = []
    for part, module in modules.items():
        module.register_forward_hook(lambda *_, part=part: calls.append(part))
    step(model, batch())
    assert sorted(calls) == sorted(set(modules) - {"teacher rpn"})


@every_student
def test_detection_losses_are_detectron2s_while_distilling(tmp_path, name):
    """Nor are the logits changed in place by the selection of boxes."""
    plain, model = detector(STUDENTS[name], seed=3), model_of(tmp_path, name)
    inputs = batch()
    for net in (plain, model):
        step(copy.deepcopy(net), inputs)  # warms scripted losses up
    expected, losses = step(plain, inputs), step(model, inputs)
    assert all(torch.equal(losses[k], expected[k]) for k in expected)


BOXES = {
    "no objects": [[], []],
    "one pixel": [[[5, 5, 6, 6]], [[0, 0, 1, 1]]],
    "outside of the padded image": [[[400, 300, 500, 400]], [[100, 80, 128, 96]]],
    "the same box": [[[10, 10, 60, 60]] * 3, []],
}
KNOBS = {
    "default": [],
    "objects alone": [KEY + "FOREGROUND_ONLY", True],
    "assigned": [KEY + "MATCH", "assigned", KEY + "ADAPTER_PER_LEVEL", True],
    "gt_mask": [KEY + "MATCH", "gt_mask"],
}


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "FasterRCNN"])
def test_finite_and_differentiable(tmp_path, name, boxes, knobs):
    model = model_of(tmp_path, name, [*knobs, KEY + "POSITIVE_IN_DENOMINATOR", False])
    terms = distilled(step(model, batch(boxes=boxes)))
    assert all(torch.isfinite(term) for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.distillers.parameters())
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


@pytest.mark.parametrize("name", ["ATSS", "GFL"])
def test_finite_without_objects(tmp_path, name):
    terms = distilled(step(model_of(tmp_path, name), batch(boxes=[[], []])))
    assert all(torch.isfinite(term) for term in terms.values())


ABLATIONS = {
    "per level": [KEY + "ADAPTER_PER_LEVEL", True, KEY + "FINAL_RELU", False],
    "wide keys": [KEY + "EMBED_DIMS", [8], KEY + "TAU_INIT", 0.5],
    "summed": [KEY + "MEAN_REDUCTION", False],
    "no projection": [KEY + "PROJ_DIM", 0],
    "raw": [KEY + "QUEUE_RAW", True],
    "no memory": [KEY + "QUEUE_SIZE", 0],
    "stopped": [KEY + "STOP_GRAD_TEACHER_PROJ", True, KEY + "EXCLUDE_SAME_CLASS", True],
    "one adapter": [KEY + "PER_ANCHOR_ADAPTER", False, KEY + "NEGATIVE_IOU", 1.0],
    "objects": [KEY + "DENSE.APPEND_GT_FOR_SGFI", True, KEY + "DENSE.USE_CENTERNESS", True],
    "two levels": [KEY + "LEVELS", ["p3", "p4"]],
    "teacher's levels": [KEY + "AGGREGATE", "teacher"],
    "before the last ReLU": [KEY + "PRE_RELU", True, KEY + "MEAN_OVER_DELTAS", True],
}


@pytest.mark.parametrize("knobs", ABLATIONS.values(), ids=ABLATIONS)
@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "FasterRCNN"])
def test_every_knob_trains(tmp_path, name, knobs):
    model = model_of(tmp_path, name, knobs)
    for _ in range(2):  # with an empty and with a filled memory
        terms = distilled(step(model, batch()))
        assert all(torch.isfinite(term) and term > 0 for term in terms.values())
        sum(terms.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())


def test_proposals_of_the_teacher(tmp_path):
    model = model_of(tmp_path, "FasterRCNN", [KEY + "ROIS", "teacher"])
    student, teacher, targets = views_of(model, batch())
    regions = model.distillers["GDetKD"].regions(student, teacher, targets)
    assert regions.boxes == [p.proposal_boxes for p in teacher.proposals]
    sum(distilled(step(model, batch())).values()).backward()
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet"])
def test_a_teacher_with_a_cascade_gives_its_first_stage(tmp_path, name):
    model = model_of(tmp_path, name, teacher_opts=CASCADE)
    terms = distilled(step(model, batch()))
    assert all(torch.isfinite(term) for term in terms.values())


@every_student
def test_imitation_equals_a_loop(tmp_path, name):
    """Region by region, level by level; one region is left as it is by another order of them."""
    model = model_of(tmp_path, name, CKD_OFF)
    student, teacher, targets = views_of(model, batch([(64, 96)]))
    sgfi = model.distillers["GDetKD"].imitation
    corners = torch.tensor([[4.0, 6, 40, 50], [10, 2, 90, 60], [30, 30, 42, 44]])
    with EventStorage(), torch.no_grad():
        target = teacher.rois([Boxes(corners)]).features
        loss = sgfi(student.features, [Boxes(corners)], target)
        shuffled = [Boxes(corners[[2, 0, 1]])]
        again = sgfi(student.features, shuffled, target[[2, 0, 1]])
        total = 0
        for box, t in zip(corners, target):
            pooled = [
                sgfi.adapters[0](pool([student.features[level.name]], [Boxes(box[None])]))[0]
                for pool, level in zip(sgfi.poolers, sgfi.levels)
            ]
            products = [(sgfi.embed(x[None]) * sgfi.embed(t[None])).sum() for x in pooled]
            weights = torch.stack(products).softmax(dim=0)
            total += (sum(w * x for w, x in zip(weights, pooled)) - t).square().mean()
    assert len(sgfi.levels) == 5
    assert loss.item() == pytest.approx(total.item() / 3, rel=1e-4)
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)


def test_one_level_is_plain_region_imitation(tmp_path):
    model = model_of(tmp_path, "FasterRCNN", [KEY + "LEVELS", ["p3"]])
    student, teacher, _ = views_of(model, batch([(64, 96)]))
    sgfi, boxes = model.distillers["GDetKD"].imitation, [Boxes(torch.tensor([[4.0, 6, 40, 50]]))]
    with EventStorage():
        target = teacher.rois(boxes).features
        loss = sgfi(student.features, boxes, target)
        pooled = sgfi.adapters[0](sgfi.poolers[0]([student.features["p3"]], boxes))
    assert loss.item() == pytest.approx((pooled - target).square().mean().item(), rel=1e-5)


def test_assigned_level_is_that_of_the_students_own_box_head(tmp_path):
    model = model_of(tmp_path, "FasterRCNN", [KEY + "MATCH", "assigned"])
    student, _, _ = views_of(model, batch())
    sgfi = model.distillers["GDetKD"].imitation
    boxes = [p.proposal_boxes for p in student.proposals]
    levels = [student.features[level.name] for level in sgfi.levels]
    assert torch.allclose(sgfi.poolers[0](levels, boxes), student.rois(boxes).features)


def test_masked_imitation_by_hand(tmp_path):
    model = model_of(tmp_path, "RetinaNet", [*CKD_OFF, KEY + "MATCH", "gt_mask"])
    inputs = batch([(64, 64)], boxes=[[[8, 16, 28, 28]]])
    student, teacher, _ = views_of(model, inputs)
    sgfi = model.distillers["GDetKD"].imitation
    # Truncated to cells: two of p3, one of p4, one of the coarser levels
    cells = {"p3": [(2, 1), (2, 2)], "p4": [(1, 0)], "p5": [(0, 0)], "p6": [(0, 0)]}
    squared = []
    for name, marked in cells.items():
        difference = sgfi.adapter(student.features[name]) - teacher.features[name]
        squared += [difference[0, :, y, x].square().mean() for y, x in marked]
    expected = torch.stack(squared).mean().item()
    assert distilled(step(model, inputs))["sgfi"].item() == pytest.approx(expected, rel=1e-5)


def test_same_detector_has_no_prediction_loss(tmp_path):
    frozen = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""]
    opts = [*frozen, "MODEL.BASIC_RESNET.WIDTH", 16]
    model = model_of(tmp_path, "FasterRCNN", opts, teacher_opts=frozen)
    model.student.load_state_dict(model.teacher.detector.state_dict())
    terms = distilled(step(model, batch()))
    assert abs(terms["cls"].item()) < 1e-6 and abs(terms["bbox"].item()) < 1e-6


def test_memory_fills_and_is_saved_with_the_distiller_alone(tmp_path):
    model = model_of(tmp_path, "FasterRCNN")
    memory = model.distillers["GDetKD"].contrast.memory
    step(model, batch())
    count = 2 * model.student.roi_heads.batch_size_per_image
    assert ((memory.vectors != 0).any(dim=1)).sum() == count < len(memory.vectors)
    assert torch.equal(memory.vectors[-1].norm(), memory.vectors[-1].norm().clamp(0.999, 1.001))
    assert not memory.vectors.requires_grad
    assert any(k.endswith("memory.vectors") for k in model.distillers.state_dict())
    assert not any("memory" in k for k in model.student.state_dict())
    again = model_of(tmp_path, "FasterRCNN")
    again.distillers.load_state_dict(model.distillers.state_dict())
    assert torch.equal(again.distillers["GDetKD"].contrast.memory.vectors, memory.vectors)


def test_step_is_compared_with_the_memory_before_it_enters(tmp_path):
    """In one image, all overlap: only the memory is left, and it is empty in the first step."""
    model = model_of(tmp_path, "FasterRCNN", [KEY + "NEGATIVE_IOU", 0.0])
    contrast = model.distillers["GDetKD"].contrast
    vectors = torch.rand(3, 16)
    boxes = [Boxes(torch.tensor([[0.0, 0, 9, 9], [1, 1, 9, 9], [0, 1, 9, 9]]))]
    classes = [torch.tensor([0, 1, -1])]
    with EventStorage():
        first = contrast(vectors, vectors, boxes, classes)
        second = contrast(vectors, vectors, boxes, classes)
    assert first == 0 and second > 0


def test_head_transfer_survives_the_loading_of_a_backbone(tmp_path):
    opts = [KEY + "HEAD_TRANSFER", True, KEY + "HEAD_TRANSFER_RPN", True]
    model = model_of(tmp_path, "FasterRCNN", opts)
    weights = {
        k[len("backbone.bottom_up.") :]: v
        for k, v in detector(STUDENTS["FasterRCNN"], seed=9).state_dict().items()
        if k.startswith("backbone.bottom_up.")
    }
    torch.save({"model": weights, "matching_heuristics": True}, tmp_path / "backbone.pth")
    DetectionCheckpointer(model.student).load(str(tmp_path / "backbone.pth"))
    stem = model.student.backbone.bottom_up.stem.conv1.weight
    assert torch.equal(stem, weights["stem.conv1.weight"])
    ours, theirs = model.student, model.teacher.detector
    for part in ("roi_heads", "proposal_generator.rpn_head"):
        for a, b in zip(
            ours.get_submodule(part).parameters(), theirs.get_submodule(part).parameters()
        ):
            assert torch.equal(a, b) and a.requires_grad and a.data_ptr() != b.data_ptr()


def test_student_and_teacher_see_their_own_normalisation(tmp_path):
    """As with Detectron2's X101, whose PIXEL_STD is not that of the R50."""
    theirs = ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]]
    theirs += ["MODEL.PIXEL_STD", [57.375, 57.12, 58.395]]
    ours = ["MODEL.PIXEL_MEAN", [100.0, 110.0, 120.0], "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]
    model = model_of(tmp_path, "FasterRCNN", ours, teacher_opts=theirs)
    inputs = batch([(64, 96)])
    student, teacher, _ = views_of(model, inputs)
    for view, opts in ((student, ours), (teacher, theirs)):
        mean, std = (torch.tensor(x)[:, None, None] for x in (opts[1], opts[3]))
        expected = (inputs[0]["image"] - mean) / std
        assert torch.allclose(view.images.tensor[0], expected, atol=1e-4)


def test_numbers_are_logged_every_20_iterations(tmp_path):
    model = model_of(tmp_path, "FasterRCNN")
    for iteration in (18, 19):
        with EventStorage(iteration) as storage:
            model(batch())
        found = {k: v for k, (v, _) in storage.latest().items() if k.startswith("distill/gdetkd")}
        assert bool(found) == (iteration == 19)
    shares = [found[f"distill/gdetkd_sgfi/p{k}"] for k in range(2, 7)]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert 0 < found["distill/gdetkd_sgfi/entropy"] <= 1.6095
    assert found["distill/gdetkd_sgfi/temperature"] == pytest.approx(1.0)
    assert 0 <= found["distill/gdetkd_ckd/hit_rate"] <= 1
    assert found["distill/gdetkd_ckd/excluded"] >= 0


def test_half_precision(tmp_path):
    for name in ("FasterRCNN", "RetinaNet"):
        model = model_of(tmp_path, name)
        with torch.autocast("cpu", torch.bfloat16):
            terms = distilled(step(model, batch()))
        assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
        assert model.distillers["GDetKD"].contrast.memory.vectors.dtype == torch.float32


def none(boxes):
    return boxes[:0]


def first(boxes):
    return boxes[:1]


def copies_of_first(boxes):
    return boxes[torch.zeros(5, dtype=torch.long)]


@pytest.mark.parametrize("change", [none, first, copies_of_first])
@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet"])
def test_few_regions_and_regions_that_all_overlap(tmp_path, name, change):
    """Per image. Without any, all terms are 0 and reach every parameter."""
    model = model_of(tmp_path, name)
    distiller = model.distillers["GDetKD"]
    sampled = distiller.regions

    def changed(*args):
        boxes, classes, anchors = sampled(*args)
        boxes, classes = ([change(x) for x in per_image] for per_image in (boxes, classes))
        return Regions(boxes, classes, anchors and [change(x) for x in anchors])

    distiller.regions = changed
    terms = distilled(step(model, batch()))
    assert all((term == 0) == (change is none) and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_masks_take_no_regions(tmp_path):
    """Nor does the teacher's box head run."""
    model = model_of(tmp_path, "RetinaNet", [*CKD_OFF, KEY + "MATCH", "gt_mask"])
    distiller, ran = model.distillers["GDetKD"], []
    assert distiller.requires["sgfi"] == Needs(student=("features",), teacher=("features",))
    distiller.regions = lambda *_: ran.append("regions")
    model.teacher.detector.roi_heads.box_head.register_forward_hook(lambda *_: ran.append("head"))
    assert distilled(step(model, batch()))["sgfi"] > 0 and not ran

"""G-DetKD's distiller on detectors: what runs, the contrast, class and box terms, head transfer."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.structures import Boxes
from gdetkd_cases import (
    CASCADE,
    CKD_OFF,
    DENSE,
    KEY,
    PREDICTIONS_OFF,
    SGFI_OFF,
    calls_of,
    distilled,
    model_of,
    region_contrast,
    regions_of,
    views_of,
)
from toys import AS_LOADED, STUDENTS, batch, detector, gradients, step

from d2kd.methods.gdetkd import class_aware_localization
from d2kd.methods.gdetkd.predictions import classification_kl
from d2kd.views import Dense, Features, Proposals, Regions, RegionSet, Tower

FOREGROUND = [KEY + "FOREGROUND_ONLY", True]
TEACHER_PROPOSALS = [KEY + "PROPOSALS_FROM", "teacher"]
BEFORE = [KEY + "PRE_ACTIVATION", True]
PREDICTIONS = Regions(predictions=True)
every_student = pytest.mark.parametrize("name", STUDENTS)


def heads_of(model):
    """What may run beside the backbones."""
    student, teacher = model.student, model.teacher.detector
    modules = {
        "teacher rpn": teacher.proposal_generator.rpn_head,
        "teacher box head": teacher.roi_heads.box_head,
    }
    if hasattr(student, "roi_heads"):
        return {**modules, "student box head": student.roi_heads.box_head}
    return {**modules, "student head": student.head}


@pytest.mark.parametrize("opts", [[], FOREGROUND, BEFORE], ids=["all", "objects", "before"])
@every_student
def test_every_box_head_runs_once(tmp_path, name, opts):
    """The teacher's RPN never runs, and objects alone are some of what was seen."""
    model = model_of(tmp_path, name, opts)
    modules = heads_of(model)
    calls = calls_of(modules)
    step(model, batch())
    assert sorted(calls) == sorted(set(modules) - {"teacher rpn"})


@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet"])
def test_objects_alone_are_the_foreground_of_all_regions(tmp_path, name):
    model = model_of(tmp_path, name, FOREGROUND)
    distiller = model.distillers["GDetKD"]
    student, teacher, objects = views_of(model, batch())
    if name == "RetinaNet":  # objects where boxes are predicted, so that there are positives
        for target, boxes in zip(objects, distiller.source.sample(student, None, objects).boxes):
            target.gt_boxes = boxes[: len(target)]
    some = distiller.regions(student, teacher, objects)
    foreground = torch.cat(some.parent.classes) < 6
    assert 0 < foreground.sum() < len(foreground)
    assert torch.equal(some.rows, foreground.nonzero()[:, 0])
    everything = Boxes.cat(some.parent.boxes).tensor
    assert torch.equal(Boxes.cat(some.boxes).tensor, everything[foreground])
    assert (torch.cat(some.classes) < 6).all()
    if name == "FasterRCNN":  # its own proposals: what its forward made of them
        seen = student.regions(some.parent, PREDICTIONS)
        assert torch.equal(student.regions(some, PREDICTIONS).logits, seen.logits[foreground])


def test_what_the_terms_read(tmp_path):
    two_stage = model_of(tmp_path, "FasterRCNN").reads
    hidden = Regions(hidden=True)
    reads = two_stage["GDetKD", "ckd"]
    assert reads.student == (Features(), Proposals(), hidden) and reads.teacher == (hidden,)
    for term in ("cls", "bbox"):
        reads = two_stage["GDetKD", term]
        assert reads.student == (Proposals(), PREDICTIONS) and reads.teacher == (PREDICTIONS,)
    reads = model_of(tmp_path, "RetinaNet", BEFORE).reads["GDetKD", "ckd"]
    assert reads.student == (Features(), Dense(), Tower("cls", 2, pre_activation=True))
    assert reads.teacher == (Regions(pre_activation=True),)
    reads = model_of(tmp_path, "FasterRCNN", TEACHER_PROPOSALS).reads["GDetKD", "cls"]
    assert reads.student == (PREDICTIONS,) and reads.teacher == (Proposals(), PREDICTIONS)


@pytest.mark.parametrize(
    "wanted",
    [{"sgfi"}, {"ckd"}, {"cls"}, {"bbox"}, {"sgfi", "bbox"}],
    ids=lambda x: "-".join(sorted(x)),
)
def test_wanted_terms_alone_are_computed(tmp_path, wanted):
    model = model_of(tmp_path, "FasterRCNN")
    student, teacher, objects = views_of(model, batch())
    distiller = model.distillers["GDetKD"]
    everything = distiller(student, teacher, objects)
    before = distiller.contrast.queue.vectors.clone()
    distiller.want(wanted)
    terms = distiller(student, teacher, objects)
    assert terms.keys() == wanted and everything.keys() == {"sgfi", "ckd", "cls", "bbox"}
    assert torch.equal(distiller.contrast.queue.vectors, before) == ("ckd" not in wanted)
    assert terms.diagnostics.keys() == wanted & {"sgfi", "ckd"}
    for term in wanted - {"ckd"}:  # whose queue went on
        assert torch.equal(terms[term], everything[term])


ABLATIONS = {
    "one wide key": [KEY + "EMBED_DIMS", [8]],
    "no projection": [KEY + "PROJ_DIM", 0],
    "no queue": [KEY + "QUEUE_SIZE", 0],
    "all are negatives": [KEY + "NEGATIVE_IOU", 1.0],
    "two levels": [KEY + "LEVELS", ["p3", "p4"]],
    "teacher's levels": [KEY + "AGGREGATE", "teacher"],
    "before the last activation": BEFORE,
}


@pytest.mark.parametrize("knobs", ABLATIONS.values(), ids=ABLATIONS)
@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "FasterRCNN"])
def test_every_knob_trains(tmp_path, name, knobs):
    model = model_of(tmp_path, name, knobs)
    for _ in range(2):  # with an empty and with a filled queue
        terms = distilled(step(model, batch()))
        assert set(terms) == {"sgfi", "ckd"} | (set() if name in DENSE else {"cls", "bbox"})
        assert all(torch.isfinite(term) and term > 0 for term in terms.values())
        sum(terms.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())


def test_proposals_of_the_teacher(tmp_path):
    """The student's box head runs once more, and its own losses stay those of plain training."""
    model = model_of(tmp_path, "FasterRCNN", TEACHER_PROPOSALS)
    plain = copy.deepcopy(model.student)
    student, teacher, objects = views_of(model, batch())
    regions = model.distillers["GDetKD"].regions(student, teacher, objects)
    assert regions is teacher.proposals(Proposals())
    modules = heads_of(model)
    calls = calls_of(modules)
    losses = step(model, batch())
    assert sorted(calls) == sorted([*modules, "student box head"])
    step(plain, batch())  # as many steps of batch statistics and random numbers
    expected = step(plain, batch())
    assert all(torch.equal(losses[k], expected[k]) for k in expected)
    sum(distilled(losses).values()).backward()
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet"])
def test_a_teacher_with_a_cascade_gives_its_first_stage(tmp_path, name):
    model = model_of(tmp_path, name, teacher_opts=CASCADE)
    heads = model.teacher.detector.roi_heads.box_head
    calls = calls_of({f"stage {k}": heads[k] for k in range(3)})
    terms = distilled(step(model, batch()))
    assert all(torch.isfinite(term) for term in terms.values())
    assert calls == ["stage 0"]


def contrasted(model, inputs):
    """The vectors of student and teacher that the contrast got in one step."""
    kept = []
    contrast = model.distillers["GDetKD"].contrast
    handle = contrast.register_forward_hook(lambda _, args, __: kept.append(args[:2]))
    step(model, inputs)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet", "GFL"])
def test_vectors_before_the_last_activation(tmp_path, name):
    """The same vectors otherwise, of the same pass of both heads."""
    after, teacher_after = contrasted(model_of(tmp_path, name, SGFI_OFF), batch())
    model = model_of(tmp_path, name, [*SGFI_OFF, *BEFORE])
    calls = calls_of(heads_of(model))
    before, teacher_before = contrasted(model, batch())
    assert len(calls) == len(set(calls)) == 2
    for x, y in ((before, after), (teacher_before, teacher_after)):
        assert (x < 0).any() and (y >= 0).all() and torch.equal(x.relu(), y)
    assert before.requires_grad and not teacher_before.requires_grad


def test_queue_fills_and_is_saved_with_the_distiller_alone(tmp_path):
    model = model_of(tmp_path, "FasterRCNN")
    queue = model.distillers["GDetKD"].contrast.queue
    step(model, batch())
    count = 2 * model.student.roi_heads.batch_size_per_image
    assert ((queue.vectors != 0).any(dim=1)).sum() == count < len(queue.vectors)
    assert queue.vectors[0].norm().item() == pytest.approx(1, abs=1e-3)
    assert not queue.vectors.requires_grad
    assert any(k.endswith("queue.vectors") for k in model.distillers.state_dict())
    assert not any("queue" in k for k in model.student.state_dict())
    again = model_of(tmp_path, "FasterRCNN")
    again.distillers.load_state_dict(model.distillers.state_dict())
    restored = again.distillers["GDetKD"].contrast.queue
    assert torch.equal(restored.vectors, queue.vectors) and restored.next == queue.next == count


def test_step_is_compared_with_the_queue_before_it_enters(tmp_path):
    """In one image, all overlap: only the queue is left, and it is empty in the first step."""
    contrast = model_of(tmp_path, "FasterRCNN", [KEY + "NEGATIVE_IOU", 0.0])
    contrast = contrast.distillers["GDetKD"].contrast
    vectors = torch.rand(3, 16)
    regions = regions_of(torch.tensor([[0.0, 0, 9, 9], [1, 1, 9, 9], [0, 1, 9, 9]]))
    (first, _), (second, _) = (contrast(vectors, vectors, regions) for _ in range(2))
    assert first == 0 and second > 0


def test_every_anchor_of_a_location_has_an_adapter_of_its_own():
    torch.manual_seed(0)
    contrast = region_contrast(4, 5, proj_dim=3, num_anchors=3, queue_size=0)
    vectors, anchors = torch.randn(4, 4), [torch.tensor([0, 7]), torch.tensor([5, 3])]
    weight, bias = contrast.adapter.weight.unflatten(0, (3, 5)), contrast.adapter.bias.view(3, 5)
    expected = [weight[a] @ x + bias[a] for x, a in zip(vectors, (0, 1, 2, 0))]
    assert torch.allclose(contrast.adapt(vectors, anchors), torch.stack(expected), atol=1e-6)


def test_diagnostics_of_the_contrast(tmp_path):
    contrast = region_contrast(5, 6, proj_dim=4, queue_size=8)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30]])
    loss, diagnostics = contrast(torch.randn(3, 5), torch.randn(3, 6), regions_of(boxes))
    numbers = diagnostics()
    assert numbers["excluded"] == 2 and 0 <= numbers["hit_rate"] <= 1
    model = model_of(tmp_path, "FasterRCNN")
    terms = model.distillers["GDetKD"](*views_of(model, batch()))
    assert "excluded" in terms.diagnostics["ckd"]() and "p2" in terms.diagnostics["sgfi"]()


def test_same_detector_has_no_prediction_loss(tmp_path):
    frozen = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""]
    opts = [*AS_LOADED, *frozen, "MODEL.BASIC_RESNET.WIDTH", 16]
    model = model_of(tmp_path, "FasterRCNN", opts, teacher_opts=frozen)
    model.student.load_state_dict(model.teacher.detector.state_dict())
    terms = distilled(step(model, batch()))
    assert abs(terms["cls"].item()) < 1e-6 and abs(terms["bbox"].item()) < 1e-6


def test_box_deltas_are_compared_in_the_students_units(tmp_path):
    """A box that both predict has other deltas, where BBOX_REG_WEIGHTS differ."""
    weights = "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"
    ours, theirs = (10.0, 20.0, 5.0, 4.0), (5.0, 5.0, 1.0, 8.0)
    teacher = {"teacher_opts": [weights, theirs]}
    model = model_of(tmp_path, "FasterRCNN", [weights, ours], **teacher)
    student, teacher, _ = views_of(model, batch())
    regions = student.proposals(Proposals())
    found = model.distillers["GDetKD"].predictions(student, teacher, regions)
    s, t = student.regions(regions, PREDICTIONS), teacher.regions(regions, PREDICTIONS)
    raw = [x.deltas.unflatten(1, (-1, 4)) / torch.tensor(w) for x, w in ((s, ours), (t, theirs))]
    expected = class_aware_localization(
        t.logits.softmax(dim=1), raw[1] * torch.tensor(ours), raw[0] * torch.tensor(ours)
    )
    assert found["bbox"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(found["cls"], classification_kl(s.logits, t.logits))
    proposals = Boxes.cat(regions.boxes).tensor
    detectors = (model.student, model.teacher.detector)
    coders = [net.roi_heads.box_predictor.box2box_transform for net in detectors]
    scaled = t.deltas * model.distillers["GDetKD"].delta_scale.repeat(6)
    same = [c.apply_deltas(d, proposals) for c, d in zip(coders, (scaled, t.deltas))]
    assert torch.allclose(*same, atol=1e-3)


@pytest.mark.parametrize("agnostic", [(True, False), (False, True), (True, True)])
def test_class_agnostic_boxes(tmp_path, agnostic):
    """Of the student, of the teacher, of both."""
    key = "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
    teacher = {"teacher_opts": [key, agnostic[1]]}
    model = model_of(tmp_path, "FasterRCNN", [key, agnostic[0]], **teacher)
    term = distilled(step(model, batch()))["bbox"]
    term.backward()
    assert term > 0
    assert model.student.roi_heads.box_predictor.bbox_pred.weight.grad.abs().sum() > 0


def test_head_transfer_survives_the_loading_of_a_backbone(tmp_path):
    model = model_of(tmp_path, "FasterRCNN", [KEY + "HEAD_TRANSFER", True])
    weights = {
        k[len("backbone.bottom_up.") :]: v
        for k, v in detector(STUDENTS["FasterRCNN"], seed=9).state_dict().items()
        if k.startswith("backbone.bottom_up.")
    }
    torch.save({"model": weights, "matching_heuristics": True}, tmp_path / "backbone.pth")
    DetectionCheckpointer(model.student).load(str(tmp_path / "backbone.pth"))
    stem = model.student.backbone.bottom_up.stem.conv1.weight
    assert torch.equal(stem, weights["stem.conv1.weight"])
    heads = [net.roi_heads for net in (model.student, model.teacher.detector)]
    for a, b in zip(*(h.parameters() for h in heads)):
        assert torch.equal(a, b) and a.requires_grad and a.data_ptr() != b.data_ptr()


def test_only_head_transfer_fills_the_student_and_says_so(tmp_path):
    """Without a term on the box head, too."""
    plain = detector(STUDENTS["FasterRCNN"])
    for opts, filled in (([], 0), ([KEY + "HEAD_TRANSFER", True], 1)):
        model = model_of(tmp_path, "FasterRCNN", [*CKD_OFF, *PREDICTIONS_OFF, *opts])
        model.student.load_state_dict(plain.state_dict())
        distiller = model.distillers["GDetKD"]
        lines = distiller.initialize_student(model.family, model.teacher.family)
        assert len(lines) == filled and all("HEAD_TRANSFER" in line for line in lines)
        after, theirs = model.student.state_dict(), model.teacher.detector.state_dict()
        for name, before in plain.state_dict().items():
            copied = filled and name.startswith("roi_heads.")
            assert torch.equal(after[name], theirs[name] if copied else before), name


def test_head_transfer_of_every_stage_of_a_cascade(tmp_path):
    opts = [*CASCADE, KEY + "HEAD_TRANSFER", True]
    model = model_of(tmp_path, "FasterRCNN", opts, teacher_opts=CASCADE)
    heads = [net.roi_heads for net in (model.student, model.teacher.detector)]
    assert len(heads[0].box_head) == 3
    for part in ("box_head", "box_predictor"):
        ours, theirs = (getattr(h, part).state_dict() for h in heads)
        assert ours and all(torch.equal(ours[k], theirs[k]) for k in ours)


def none(boxes):
    return torch.zeros(0, dtype=torch.long)


def first(boxes):
    return torch.zeros(1, dtype=torch.long)


def copies_of_first(boxes):
    return torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize("chosen", [none, first, copies_of_first])
@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet"])
def test_few_regions_and_regions_that_all_overlap(tmp_path, name, chosen):
    """Per image. Without any, all terms are 0 and reach every parameter."""
    model = model_of(tmp_path, name)
    distiller = model.distillers["GDetKD"]
    sampled = distiller.regions

    def changed(*args):
        regions = sampled(*args)
        index = [chosen(b) for b in regions.boxes]
        parts = (regions.boxes, regions.classes, regions.anchors)
        return RegionSet(*[part and [x[i] for x, i in zip(part, index)] for part in parts])

    distiller.regions = changed
    terms = distilled(step(model, batch()))
    assert all((term == 0) == (chosen is none) and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert all(torch.isfinite(g).all() for g in gradients(model).values())

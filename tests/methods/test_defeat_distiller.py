"""DeFeat's distiller: which regions and proposals count, what runs, and what is refused."""

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import BitMasks, BoxMode, pairwise_iou
from toys import AS_LOADED, batch, distill_config, gradients, step

from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.methods.defeat import DeFeat, decoupled_classification
from d2kd.views import Proposals, Regions, Stage

KEY = "DISTILL.DEFEAT."
NECK_OFF = [KEY + "NECK_OBJECT.WEIGHT", 0.0, KEY + "NECK_BACKGROUND.WEIGHT", 0.0]
STAGE_ON = [KEY + "STAGE_OBJECT.WEIGHT", 2.0, KEY + "STAGE_BACKGROUND.WEIGHT", 8.0]
HEAD_ON = [KEY + "HEAD_OBJECT.WEIGHT", 2.0, KEY + "HEAD_BACKGROUND.WEIGHT", 2.0]

MASK_ON = ["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
MASK_ON += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1]
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
CASCADE += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
TWO_STAGE = {"faster": [], "mask": MASK_ON, "cascade": CASCADE}
every_two_stage = pytest.mark.parametrize("name", TWO_STAGE)
every_sampler = pytest.mark.parametrize("sampler", ["teacher", "student", "both"])


def model_of(folder, name, opts=(), **teacher):
    """A pair of one kind: "RetinaNet", "FCOS" or one of TWO_STAGE."""
    student = "FasterRCNN" if name in TWO_STAGE else name
    kind = TWO_STAGE.get(name, [])
    teacher.setdefault("teacher_opts", kind)
    cfg = distill_config(folder, student, [*kind, *opts], methods=["DeFeat"], **teacher)
    torch.manual_seed(3)
    return build_model(cfg)


def inputs_with_masks(**kwargs):
    inputs = batch(**kwargs)
    for x in inputs:
        boxes = x["instances"].gt_boxes.tensor
        masks = torch.zeros(len(boxes), x["height"], x["width"], dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top:bottom, left:right] = True
        x["instances"].gt_masks = BitMasks(masks)
    return inputs


def seen_views(model):
    """A list to which every step adds what DeFeat gets: both views and the targets."""
    views = []
    model.distillers["DeFeat"].register_forward_hook(lambda _, inputs, __: views.append(inputs))
    return views


def distilled(losses):
    return {k[len("loss_defeat_") :]: v for k, v in losses.items() if k.startswith("loss_defeat_")}


@every_two_stage
@every_sampler
def test_head_terms_train_the_box_head_but_not_its_deltas(tmp_path, name, sampler):
    model = model_of(tmp_path, name, [*NECK_OFF, *HEAD_ON, KEY + "PROPOSALS_FROM", sampler])
    assert not list(model.distillers.parameters())
    terms = distilled(step(model, inputs_with_masks()))
    assert set(terms) == {"head_object", "head_background"}
    assert all(term > 0 for term in terms.values())
    sum(terms.values()).backward()
    box_head = model.family.box_head
    assert all(p.grad.abs().sum() > 0 for p in box_head.head(0).parameters())
    assert box_head.predictor(0).cls_score.weight.grad.abs().sum() > 0
    assert box_head.predictor(0).bbox_pred.weight.grad is None
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


@every_two_stage
@every_sampler
def test_forward_passes(tmp_path, name, sampler):
    """The student's backbone and RPN run once, its box head once more where the teacher samples;
    the teacher's backbone once, its RPN only where it samples."""
    model = model_of(tmp_path, name, [*STAGE_ON, *HEAD_ON, KEY + "PROPOSALS_FROM", sampler])
    calls = []
    for who, net in (("student", model.student), ("teacher", model.teacher.detector)):
        modules = {
            "backbone": net.backbone,
            "stages": net.backbone.bottom_up,
            "rpn": net.proposal_generator.rpn_head,
            "roi heads": net.roi_heads,
            "pooler": net.roi_heads.box_pooler,
        }
        if name == "mask":
            modules["mask head"] = net.roi_heads.mask_head
        for part, module in modules.items():
            module.register_forward_hook(
                lambda *_, who=who, part=part: calls.append(f"{who} {part}")
            )
    step(model, inputs_with_masks())
    counts = {call: calls.count(call) for call in calls}
    expected = {
        f"{who} {part}": 1 for who in ("student", "teacher") for part in ("backbone", "stages")
    }
    expected.update({"student rpn": 1, "student roi heads": 1})
    expected["student pooler"] = (3 if name == "cascade" else 1) + (sampler != "student")
    expected["teacher pooler"] = 2 if sampler == "both" else 1
    if sampler != "student":
        expected["teacher rpn"] = 1
    if name == "mask":
        expected["student mask head"] = 1
    assert counts == expected


@every_two_stage
def test_same_detector_on_student_samples_has_no_head_loss(tmp_path, name):
    """With the teacher's own weights and running means, only rounding is left."""
    model = model_of(
        tmp_path,
        name,
        [*AS_LOADED, *NECK_OFF, *HEAD_ON, KEY + "PROPOSALS_FROM", "student"]
        + ["MODEL.RESNETS.NORM", "FrozenBN"]
        + ["MODEL.FPN.NORM", "", "MODEL.BASIC_RESNET.WIDTH", 16],
        teacher_opts=[*TWO_STAGE[name], "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""],
    )
    model.student.load_state_dict(model.teacher.detector.state_dict())
    terms = distilled(step(model, inputs_with_masks()))
    assert all(abs(term.item()) < 1e-6 for term in terms.values())


def test_labels_are_those_of_the_sampling_that_made_the_boxes(tmp_path):
    model = model_of(tmp_path, "faster", [*NECK_OFF, *HEAD_ON, KEY + "PROPOSALS_FROM", "both"])
    views = seen_views(model)
    step(model, batch())
    student, teacher, targets = views[0]
    sampled = [view.proposals(Proposals()) for view in (student, teacher)]
    for regions in sampled:
        for boxes, classes, target in zip(regions.boxes, regions.classes, targets):
            iou, nearest = pairwise_iou(boxes, target.gt_boxes).max(dim=1)
            assert torch.equal(classes < 6, iou >= 0.5) and (classes < 6).any()
            assert torch.equal(classes[iou >= 0.5], target.gt_classes[nearest][iou >= 0.5])
    assert not all(map(torch.equal, sampled[0].classes, sampled[1].classes))


@every_sampler
def test_head_terms_follow_from_the_views(tmp_path, sampler):
    temperatures = [KEY + "OBJECT_TEMPERATURE", 2.0, KEY + "BACKGROUND_TEMPERATURE", 5.0]
    opts = [*NECK_OFF, *HEAD_ON, *temperatures, KEY + "PROPOSALS_FROM", sampler]
    model = model_of(tmp_path, "faster", opts)
    views = seen_views(model)
    terms = distilled(step(model, batch()))
    student, teacher, _ = views[0]
    samplers = {"student": [student], "teacher": [teacher], "both": [student, teacher]}[sampler]
    expected = torch.zeros(2)
    for view in samplers:
        regions = view.proposals(Proposals())
        logits = [v.regions(regions, Regions(predictions=True)).logits for v in (student, teacher)]
        values = decoupled_classification(*logits, torch.cat(regions.classes), 6, 2.0, 5.0)
        expected = expected + 2 * torch.stack(values)
    found = torch.stack([terms["head_object"], terms["head_background"]])
    assert torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
@every_sampler
def test_every_box_head_of_a_cascade(tmp_path, stage, sampler):
    opts = [*NECK_OFF, *HEAD_ON, KEY + "CASCADE_STAGE", stage, KEY + "PROPOSALS_FROM", sampler]
    model = model_of(tmp_path, "cascade", opts)
    sum(distilled(step(model, batch())).values()).backward()
    for k in range(3):
        gradient = model.family.box_head.predictor(k).cls_score.weight.grad
        assert (gradient is not None) == (k == stage)


BOXES = {"no objects": [[], []], "outside of the padding": [[[400, 300, 500, 400]], [[7, 7, 7, 7]]]}


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
@every_two_stage
def test_all_terms_on_both_samples_are_finite(tmp_path, name, boxes):
    model = model_of(tmp_path, name, [*STAGE_ON, *HEAD_ON, KEY + "PROPOSALS_FROM", "both"])
    terms = distilled(step(model, inputs_with_masks(boxes=boxes)))
    assert len(terms) == 6 and all(torch.isfinite(term) for term in terms.values())
    sum(terms.values()).backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    if boxes is BOXES["no objects"]:
        assert terms["neck_object"] == terms["stage_object"] == terms["head_object"] == 0


def test_crowd_boxes_do_not_reach_the_masks(tmp_path):
    """Detectron2's mapper drops them; what is left is an image without objects."""
    annotation = {"bbox": [4, 4, 60, 60], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    image = torch.zeros(96, 96, 3, dtype=torch.uint8).numpy()
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR")
    dataset_dict = {"annotations": [{**annotation, "iscrowd": 1}], "height": 96, "width": 96}
    mapper._transform_annotations(dataset_dict, T.NoOpTransform(), image.shape[:2])
    assert len(dataset_dict["instances"]) == 0
    instances = annotations_to_instances([], (96, 96))
    model = model_of(tmp_path, "RetinaNet", STAGE_ON)
    inputs = [{"image": torch.from_numpy(image).permute(2, 0, 1), "instances": instances}]
    assert distilled(step(model, inputs))["neck_object"] == 0


def test_padding_counts_as_background(tmp_path):
    """The masks cover the padded batch, and both terms together every cell once."""
    model = model_of(tmp_path, "RetinaNet")
    distiller, views = model.distillers["DeFeat"], seen_views(model)
    step(model, batch(((96, 128), (40, 70)), boxes=[[[5, 5, 90, 60]], [[10, 8, 70, 40]]]))
    student, _, targets = views[0]
    masks = distiller.masks(student, targets)
    shapes = [x[:, 0].shape for x in student.features.values()]
    assert [m.shape for m in masks] == shapes
    assert not masks[0][1, 5:].any() and not masks[0][1, :, 9:].any()


def test_stage_terms_follow_from_the_views(tmp_path):
    """One box of 20 x 12 px at (8, 16), on stride 8: cells 1 and 2 of row 2 of res3, and what
    nearest-neighbour interpolation leaves of them on res4 and res5."""
    model = model_of(tmp_path, "RetinaNet", STAGE_ON)
    distiller, views = model.distillers["DeFeat"], seen_views(model)
    terms = distilled(step(model, batch([(64, 64)], boxes=[[[8, 16, 28, 28]]])))
    student, teacher, _ = views[0]
    objects, backgrounds = [], []
    cells = {"res3": [(2, 1), (2, 2)], "res4": [(1, 1)], "res5": []}
    for conv, (name, marked) in zip(distiller.stage_adapters, cells.items()):
        ours, theirs = student.stage(Stage(name)), teacher.stage(Stage(name))
        mask = torch.zeros(ours.shape[-2:], dtype=torch.bool)
        for y, x in marked:
            mask[y, x] = True
        squared = (conv(ours).relu() - theirs).square()
        objects.append(squared[..., mask].mean() / 2 if marked else torch.tensor(0.0))
        backgrounds.append(squared[..., ~mask].mean() / 2)
    expected = 2 * torch.stack(objects).mean(), 8 * torch.stack(backgrounds).mean()
    assert terms["stage_object"].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert terms["stage_background"].item() == pytest.approx(expected[1].item(), rel=1e-5)
    terms["stage_background"].backward()
    assert all(p.grad.abs().sum() > 0 for p in distiller.stage_adapters.parameters())


@pytest.mark.parametrize("pair", [("RetinaNet", "FasterRCNN"), ("faster", "RetinaNet")])
def test_pyramids_are_aligned_by_stride(tmp_path, pair):
    """P2...P6 and P3...P7 have four strides in common."""
    name, teacher = pair
    model = model_of(tmp_path, name, STAGE_ON, teacher=teacher, teacher_opts=[])
    distiller = model.distillers["DeFeat"]
    assert distiller.num_levels == 4
    assert [s.stride for s, _ in distiller.levels] == [8, 16, 32, 64]
    assert all(s.stride == t.stride for s, t in distiller.levels + distiller.stages)
    assert all(torch.isfinite(v) for v in distilled(step(model, batch())).values())


def test_level_weights_and_the_share_of_each_level(tmp_path):
    values = []
    for weights in ([1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1]):
        model = model_of(tmp_path, "RetinaNet", [KEY + "NECK_BACKGROUND.LEVEL_WEIGHTS", weights])
        values.append(distilled(step(model, batch()))["neck_background"].item())
    assert values[0] == pytest.approx(values[1] + values[2], rel=1e-5)


def test_decay_through_the_schedule(tmp_path):
    opts = ["SOLVER.MAX_ITER", 1000]
    plain = distilled(step(model_of(tmp_path, "RetinaNet", opts), batch(), iteration=750))
    decay = [KEY + "NECK_OBJECT.DECAY", "linear", KEY + "NECK_BACKGROUND.DECAY", "cosine"]
    ours = distilled(step(model_of(tmp_path, "RetinaNet", opts + decay), batch(), iteration=750))
    assert ours["neck_object"].item() == pytest.approx(0.25 * plain["neck_object"].item())
    factor = ours["neck_background"] / plain["neck_background"]
    assert factor.item() == pytest.approx(0.146447, abs=1e-5)


@pytest.mark.parametrize("part", ["neck", "stage"])
def test_without_decoupling_one_term_covers_the_map(tmp_path, part):
    inputs = batch(boxes=[[], []])
    weights = [*NECK_OFF, f"{KEY}{part.upper()}_OBJECT.WEIGHT", 1.0]
    everywhere = [*weights, f"{KEY}{part.upper()}_ASSIGN", "everywhere"]
    terms = distilled(step(model_of(tmp_path, "RetinaNet", everywhere), inputs))
    assert set(terms) == {f"{part}_object"}
    both = [*weights, f"{KEY}{part.upper()}_BACKGROUND.WEIGHT", 1.0]
    whole = distilled(step(model_of(tmp_path, "RetinaNet", both), inputs))
    assert whole[f"{part}_object"] == 0
    assert terms[f"{part}_object"].item() == pytest.approx(whole[f"{part}_background"].item())


@pytest.mark.parametrize(
    "name, opts, message",
    [
        ("RetinaNet", HEAD_ON, r"DEFEAT.HEAD_OBJECT.WEIGHT .* RetinaNet is not a two-stage"),
        ("faster", [KEY + "PROPOSALS_FROM", "techer"], r"FROM is 'techer': .* mean 'teacher'"),
        ("faster", [KEY + "NECK_ASSIGN", "oficial"], r"NECK_ASSIGN is 'oficial': .* 'official'"),
        (
            "faster",
            [KEY + "STAGE_ASSIGN", "official"],
            r"STAGE_ASSIGN is 'official': known: all_le",
        ),
        (
            "faster",
            [KEY + "NECK_ASSIGN", "everywhere"],
            r"NECK_ASSIGN is .* DISTILL.DEFEAT.NECK_BACKGROUND.WEIGHT is not 0",
        ),
        (
            "faster",
            [*STAGE_ON, KEY + "STAGE_ASSIGN", "everywhere"],
            r"STAGE_ASSIGN is .* DISTILL.DEFEAT.STAGE_BACKGROUND.WEIGHT is not 0",
        ),
        ("faster", [KEY + "OBJECT_TEMPERATURE", 0.0], r"OBJECT_TEMPERATURE is 0.0: .* above 0"),
        ("faster", [*STAGE_ON, KEY + "STAGES", ["res6"]], r"DEFEAT.STAGES names 'res6'"),
        ("faster", [*STAGE_ON, KEY + "STAGES", []], r"DEFEAT.STAGES"),
        (
            "faster",
            [KEY + "SAMPLING", "both"],
            r"SAMPLING is now called DISTILL.DEFEAT.PROPOSALS_FROM",
        ),
        ("faster", [KEY + "ASSIGN", "all_levels"], r"ASSIGN is now .*NECK_ASSIGN .*STAGE_ASSIGN"),
        ("cascade", [*HEAD_ON, KEY + "CASCADE_STAGE", 3], r"CASCADE_STAGE is 3\): .* 3 box head"),
        ("faster", [*HEAD_ON, KEY + "CASCADE_STAGE", 1], r"CASCADE_STAGE is 1\): .* 1 box head"),
        (
            "faster",
            [*HEAD_ON, "MODEL.ROI_HEADS.NUM_CLASSES", 5],
            r"HEAD_OBJECT.WEIGHT .* 5 classes, the teacher's 6",
        ),
    ],
)
def test_bad_input_is_one_line_when_the_model_is_built(tmp_path, name, opts, message):
    with pytest.raises(UserError, match=message) as error:
        model_of(tmp_path, name, opts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["NECK", "STAGE"])
def test_a_background_without_decoupling_is_refused_before_a_detector_stands(part):
    node = DeFeat.default_config()
    node[f"{part}_ASSIGN"], node[f"{part}_BACKGROUND"].WEIGHT = "everywhere", 1.0
    with pytest.raises(UserError, match=f"{part}_ASSIGN is 'everywhere'"):
        DeFeat.check_config(node)
    node[f"{part}_BACKGROUND"].WEIGHT = 0.0
    DeFeat.check_config(node)


def test_levels_without_a_common_stride(tmp_path):
    coarse = ["MODEL.RETINANET.IN_FEATURES", ["p7"], "MODEL.ANCHOR_GENERATOR.SIZES", [[256.0]]]
    with pytest.raises(
        UserError, match=r"DISTILL.DEFEAT.NECK_\w+.WEIGHT.*\[4, 8, 16, 32, 64\].*\[128\]"
    ):
        model_of(tmp_path, "faster", teacher="RetinaNet", teacher_opts=coarse)


def test_level_weights_of_a_term_without_levels_are_refused(tmp_path):
    opts = [*STAGE_ON, KEY + "STAGE_OBJECT.LEVEL_WEIGHTS", [1.0, 2.0, 3.0, 4.0, 5.0]]
    with pytest.raises(UserError, match="STAGE_OBJECT.LEVEL_WEIGHTS has 5 .* no levels, none"):
        build_model(distill_config(tmp_path, "FCOS", opts, methods=["DeFeat"]))

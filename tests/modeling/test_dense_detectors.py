"""What FCOS, the FCOS of the papers, ATSS and GFL promise alike."""

import pytest
import torch
from dense_cases import (
    array,
    original_detector,
    original_ground_truth,
    pyramid_features,
    tiny_config,
)
from detectron2.config import get_cfg
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from toys import batch, step

from d2kd.distillation import build_detector
from d2kd.errors import UserError
from d2kd.layers import distributed, iou_log_loss, paired_iou

ARCHITECTURES = ["FCOS", "PaperFCOS", "ATSS", "GFL"]
OURS = ARCHITECTURES[1:]
BOXES = {
    "objects": None,
    "one image without objects": [[[10.0, 12.0, 90.0, 70.0]], []],
    "no objects": [[], []],
    "one pixel, on the border": [[[0.0, 0.0, 1.0, 1.0]], [[40.0, 0.0, 100.0, 80.0]]],
    "no area": [[[20.0, 20.0, 20.0, 20.0]], [[30.0, 10.0, 30.0, 60.0]]],
}


def tiny(architecture, opts=()):
    torch.manual_seed(0)
    return build_detector(tiny_config(architecture, opts))


def random_predictions(detector, features, scale=1.0):
    """What a head could predict, requiring gradients."""
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = detector.head(features)
    return [[(torch.randn_like(x) * scale).requires_grad_() for x in levels] for levels in outputs]


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trains_on_any_boxes(architecture, boxes):
    model = tiny(architecture)
    losses = step(model, batch(boxes=boxes))
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_learns_a_batch_and_finds_its_boxes(architecture):
    model = tiny(architecture, ["MODEL.FCOS.SCORE_THRESH_TEST", 0.05])
    inputs = batch(boxes=[[[16.0, 20.0, 80.0, 76.0]], [[30.0, 10.0, 90.0, 70.0]]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        sum(step(model, inputs).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        results = model.eval()(inputs)
    for result, x in zip(results, inputs):
        found, gt = result["instances"], x["instances"]
        assert found.image_size == (x["height"], x["width"])
        assert 0 < len(found) <= 100
        assert (found.scores[:-1] >= found.scores[1:]).all()
        iou, _ = paired_iou(found.pred_boxes.tensor[:1], gt.gt_boxes.tensor)
        assert iou.item() > 0.5
        assert found.pred_classes[0] == gt.gt_classes[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_state_dict_round_trip(architecture):
    model, other = tiny(architecture).eval(), build_detector(tiny_config(architecture)).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        image = torch.rand(1, 3, 128, 128)
        ours, theirs = (m.head(list(m.backbone(image).values())) for m in (model, other))
    assert all(torch.equal(a, b) for x, y in zip(ours, theirs) for a, b in zip(x, y))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_and_explicit_arguments_build_the_same(architecture):
    cfg = tiny_config(architecture)
    torch.manual_seed(0)
    built = build_detector(cfg)
    torch.manual_seed(0)
    explicit = type(built)(**type(built).from_config(cfg))
    assert built.state_dict().keys() == explicit.state_dict().keys()
    first, second = step(built, batch()), step(explicit, batch())
    assert all(torch.allclose(first[k], second[k]) for k in first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pictures_leave_the_step_as_it_is(architecture):
    inputs = batch()
    plain = step(tiny(architecture), inputs)
    model = tiny(architecture, ["VIS_PERIOD", 10]).train()
    torch.manual_seed(0)
    with EventStorage(10) as storage:
        losses = model(inputs)
    (_, picture, _), *more = storage._vis_data
    assert not more and picture.shape[0] == 3
    assert all(torch.equal(losses[k], plain[k]) for k in plain)


@pytest.mark.parametrize("architecture", OURS)
def test_predict_resumes_the_towers(architecture):
    head = tiny(architecture).head
    torch.nn.init.uniform_(head.scales, 0.5, 2.0)
    features = [torch.rand(2, 64, size, size) for size in (16, 8, 4, 2, 1)]
    outputs = dict(zip(("logits", "deltas", "centerness"), head(features)))
    for level, x in enumerate(features):
        parts = {
            **head.predict("cls", head.cls_subnet(x), level),
            **head.predict("bbox", head.bbox_subnet(x), level),
        }
        assert parts.keys() == outputs.keys()
        assert all(torch.equal(parts[name], outputs[name][level]) for name in outputs)


@pytest.mark.parametrize("name", ["fcos", "atss", "gfl"])
def test_an_empty_batch_costs_no_more_than_its_background(name):
    detector = original_detector(name)
    features = pyramid_features()
    predictions = random_predictions(detector, features)
    gt = [x[:0] for x in original_ground_truth()]
    images = ImageList(torch.zeros(2, 3, 128, 192), [x.image_size for x in gt])
    losses = detector.forward_training(images, features, predictions, gt)
    values = dict(zip(losses, (x.item() for x in losses.values())))
    assert sorted(values.values())[:-1] == [0.0] * (len(values) - 1)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for levels in predictions for p in levels)


@pytest.mark.parametrize("name", ["fcos", "atss", "gfl"])
def test_wild_predictions_of_negatives_do_no_harm(name):
    detector = original_detector(name)
    features = pyramid_features()
    predictions = random_predictions(detector, features)
    with torch.no_grad():  # the coarsest level has no positives
        predictions[1][-1].fill_(1e30)
    gt = original_ground_truth()
    images = ImageList(torch.zeros(2, 3, 128, 192), [x.image_size for x in gt])
    losses = detector.forward_training(images, features, predictions, gt)
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())
    assert all(p.grad.isfinite().all() for p in predictions[1])


@pytest.mark.parametrize("name", ["fcos", "atss", "gfl"])
def test_the_order_of_images_does_not_matter(name):
    detector = original_detector(name)
    features = pyramid_features()
    predictions = random_predictions(detector, features)
    gt = original_ground_truth()
    images = ImageList(torch.zeros(2, 3, 128, 192), [x.image_size for x in gt])
    losses = detector.forward_training(images, features, predictions, gt)
    swapped = [[x.flip(0) for x in levels] for levels in predictions]
    again = detector.forward_training(images, features, swapped, gt[::-1])
    assert all(torch.allclose(losses[k], again[k], rtol=1e-5) for k in losses)


@pytest.mark.parametrize("name", ["fcos", "atss", "gfl"])
def test_one_reduction_over_gpus_per_step(name, monkeypatch):
    detector = original_detector(name)
    features = pyramid_features()
    predictions = random_predictions(detector, features)
    gt = original_ground_truth()
    images = ImageList(torch.zeros(2, 3, 128, 192), [x.image_size for x in gt])
    alone = detector.forward_training(images, features, predictions, gt)

    calls = []
    monkeypatch.setattr(distributed.comm, "get_world_size", lambda: 2)
    # The other process is without objects: it adds nothing.
    monkeypatch.setattr(distributed.dist, "all_reduce", calls.append)
    halved = detector.forward_training(images, features, predictions, gt)
    assert len(calls) == 1 and not calls[0].requires_grad
    assert all(torch.allclose(halved[k], 2 * alone[k], rtol=1e-5) for k in alone)


@pytest.mark.parametrize("name", ["fcos", "atss", "gfl"])
def test_mixed_precision_leaves_the_losses_in_float32(name):
    detector = original_detector(name)
    features = pyramid_features()
    predictions = random_predictions(detector, features)
    gt = original_ground_truth()
    images = ImageList(torch.zeros(2, 3, 128, 192), [x.image_size for x in gt])
    losses = detector.forward_training(images, features, predictions, gt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = detector.forward_training(images, features, predictions, gt)
    assert all(torch.equal(losses[k], mixed[k]) for k in losses)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, deltas, *_ = detector.head(features)
    assert logits[0].dtype == torch.bfloat16 and deltas[0].dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mistakes_in_a_config_are_explained(architecture):
    node = "FCOS" if architecture == "PaperFCOS" else architecture
    with pytest.raises(UserError, match=rf"MODEL\.{node}\.IN_FEATURES names p8.*has p3, p4"):
        tiny(architecture, [f"MODEL.{node}.IN_FEATURES", ["p3", "p8"]])
    with pytest.raises(UserError, match=rf"MODEL\.{node}\.IN_FEATURES is empty"):
        tiny(architecture, [f"MODEL.{node}.IN_FEATURES", []])
    with pytest.raises(UserError, match=rf"MODEL\.{node}\.NORM is 'GN'.*48 channels"):
        tiny(architecture, ["MODEL.FPN.OUT_CHANNELS", 48])


@pytest.mark.parametrize("name", ["fcos", "atss", "gfl"])
def test_inference_takes_the_best_of_each_class(name):
    detector = original_detector(name)
    features = pyramid_features()
    predictions = random_predictions(detector, features, scale=2.0)
    images = ImageList(torch.zeros(2, 3, 128, 192), [(128, 192), (96, 160)])
    results = detector.forward_inference(images, features, predictions)
    for result, (height, width) in zip(results, images.image_sizes):
        assert isinstance(result, Instances) and len(result) == 100
        boxes = result.pred_boxes.tensor
        assert boxes.min() >= 0 and boxes[:, ::2].max() <= width and boxes[:, 1::2].max() <= height
        iou, _ = paired_iou(boxes[:, None], boxes[None])
        same = result.pred_classes[:, None] == result.pred_classes
        assert iou[same & ~torch.eye(100, dtype=torch.bool)].max() <= detector.test_nms_thresh


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["fcos", "atss", "gfl"])
def test_labels_and_losses_never_wait_for_the_gpu(name):
    detector = original_detector(name).cuda()
    features = [x.cuda() for x in pyramid_features()]
    predictions = random_predictions(detector, features)
    gt = [x.to("cuda") for x in original_ground_truth()]
    images = ImageList(torch.zeros(2, 3, 128, 192), [x.image_size for x in gt])
    anchors = detector.anchor_generator(features)
    detector.anchor_generator.forward = lambda _: anchors  # Detectron2's own part may wait
    detector.forward_training(images, features, predictions, gt)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = detector.forward_training(images, features, predictions, gt)
        sum(losses.values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_stock_config_knows_none_of_these_nodes():
    assert not {"FCOS", "ATSS", "GFL", "BASIC_RESNET"} & set(get_cfg().MODEL)


@pytest.mark.parametrize("kind", ["giou", "iou_log"])
def test_box_losses_equal_the_original(kind):
    boxes, targets = array("box/pred").requires_grad_(), array("box/target")
    iou, giou = paired_iou(boxes, targets)
    rowwise = 1 - giou if kind == "giou" else iou_log_loss(iou)
    assert torch.allclose(rowwise, array(f"box/{kind}_loss_rowwise"), rtol=1e-9, atol=1e-12)
    if kind == "giou":
        # The original divides by its average factor, 1 here, plus float32's epsilon.
        total = (2 * rowwise * array("box/weight")).sum() / (1 + torch.finfo(torch.float32).eps)
        total.backward()
        assert torch.allclose(boxes.grad, array("box/giou_grad_pred"), rtol=1e-9, atol=1e-12)

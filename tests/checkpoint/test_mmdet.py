"""MMDetection's checkpoints: what our detectors compute with them is what MMDetection computes."""

import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes
from mmdet_cases import ALL, DENSE, Case, needs_reference

pytestmark = needs_reference
_CASES = {}


@pytest.fixture
def case(request):
    if request.param not in _CASES:
        _CASES[request.param] = Case(request.param)
    return _CASES[request.param]


every = pytest.mark.parametrize("case", ALL, indirect=True)
dense = pytest.mark.parametrize("case", DENSE, indirect=True)
two_stage = pytest.mark.parametrize("case", ["faster_rcnn"], indirect=True)


@every
def test_input_stages_and_levels(case):
    assert case.unfilled == []
    assert case.error(case.images.tensor, "input") < 1e-5
    for name, x in case.stages.items():
        assert case.error(x, f"backbone/c{name[-1]}") < 1e-5
    for name, x in case.levels.items():  # P7 included
        assert case.error(x, f"fpn/{name}") < 1e-5


@dense
def test_raw_outputs(case):
    for name, x in case.head_outputs(case.levels).items():
        assert case.error(x, f"head/{name}") < 1e-5, name


@dense
def test_head_alone(case):
    inputs = {level: case.expected(f"head_alone/input/{level}") for level in case.levels}
    for name, x in case.head_outputs(inputs).items():
        assert case.error(x, f"head_alone/{name}") < 1e-5, name


@every
def test_anchors(case):
    if case.name == "fcos":
        keys = {level: f"points/{level}" for level in case.levels}
        centers = case.detector.anchor_generator(list(case.levels.values()))
        anchors = [(x.tensor[:, :2] + x.tensor[:, 2:]) / 2 for x in centers]
    else:
        keys = {level: f"anchors/{level}" for level in case.levels}
        owner = getattr(case.detector, "proposal_generator", case.detector)
        anchors = [x.tensor for x in owner.anchor_generator(list(case.levels.values()))]
    for (level, key), x in zip(keys.items(), anchors):
        assert torch.allclose(x, case.expected(key), atol=1e-4), level


def boxes_before_nms(detector, images, features, outputs, i):
    """RetinaNet's inference with MMDetection's order: boxes are clipped, and dropped if nothing is
    left of them, before NMS."""
    logits, deltas = (
        [permute_to_N_HWA_K(x, size)[i] for x in levels]
        for levels, size in zip(outputs, (detector.num_classes, 4))
    )
    found = detector._decode_multi_level_predictions(
        detector.anchor_generator(features),
        [x.sigmoid() for x in logits],
        deltas,
        detector.test_score_thresh,
        detector.test_topk_candidates,
        images.image_sizes[i],
    )
    found.pred_boxes.clip(images.image_sizes[i])
    found = found[found.pred_boxes.nonempty()]
    keep = batched_nms(
        found.pred_boxes.tensor, found.scores, found.pred_classes, detector.test_nms_thresh
    )
    return found[keep[: detector.max_detections_per_image]]


def detections(case):
    """Final detections of both images, in pixels of the input."""
    detector, features = case.detector, list(case.levels.values())
    with torch.no_grad():
        if case.name == "faster_rcnn":
            return detector.inference(case.inputs, do_postprocess=False)
        outputs = detector.head(features)
        if case.name == "retinanet":
            return [boxes_before_nms(detector, case.images, features, outputs, i) for i in range(2)]
        return detector.forward_inference(case.images, features, outputs)


@every
def test_final_detections(case):
    for i, found in enumerate(detections(case)):
        boxes, scores, labels = (
            case.expected(f"det/{i}/{key}") for key in ("boxes", "scores", "labels")
        )
        assert len(found) == len(boxes) > 0
        assert torch.equal(found.pred_classes, labels)
        assert torch.allclose(found.scores, scores, atol=1e-6)
        assert torch.allclose(found.pred_boxes.tensor, boxes, atol=1e-4)


@two_stage
def test_rpn_and_proposals(case):
    rpn = case.detector.proposal_generator
    features = [case.levels[f] for f in rpn.in_features]
    with torch.no_grad():
        outputs = rpn.rpn_head(features)
        proposals, _ = rpn(case.images, case.levels)
    for name, levels in zip(("cls", "bbox"), outputs):
        for level, x in zip(case.levels, levels):
            assert case.error(x, f"rpn/{name}/{level}") < 1e-5
    for i, found in enumerate(proposals):
        boxes, scores = (
            case.expected(f"proposals/{i}/boxes"),
            case.expected(f"proposals/{i}/scores"),
        )
        assert torch.allclose(found.proposal_boxes.tensor, boxes, atol=1e-4)
        assert torch.allclose(found.objectness_logits.sigmoid(), scores, atol=1e-6)


@two_stage
def test_box_head_on_given_boxes(case):
    rois = case.expected("roi/rois")
    heads = case.detector.roi_heads
    boxes = [Boxes(rois[rois[:, 0] == i, 1:]) for i in range(2)]
    assert torch.equal(rois[:, 0].sort().values, rois[:, 0])
    with torch.no_grad():
        features = heads.box_pooler([case.levels[f] for f in heads.box_in_features], boxes)
        scores, deltas = heads.box_predictor(heads.box_head(features))
    assert case.error(features, "roi/features") < 1e-5
    assert case.error(scores, "roi/cls_score") < 1e-5
    assert case.error(deltas, "roi/bbox_pred") < 1e-5

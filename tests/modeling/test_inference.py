"""From the predictions of ATSS, GFL and the papers' FCOS to detections."""

import pytest
import torch
from dense_cases import original_detector, pyramid_features
from detectron2.structures import ImageList

SIZE = (128, 192)


def predictions(detector, logits=-9.0):
    """What a head predicts: scores of ``logits``, boxes of four strides around every location."""
    torch.manual_seed(0)
    features = pyramid_features()
    with torch.no_grad():
        outputs = detector.head(features)
    values = (logits, 4.0 if len(outputs[1][0][0]) == 4 else 0.0, 9.0)
    return features, [[torch.full_like(x, v) for x in xs] for xs, v in zip(outputs, values)]


def detect(detector, features, outputs, size=SIZE):
    images = ImageList(torch.zeros(2, 3, *SIZE), [size, SIZE])
    with torch.no_grad():
        return detector.forward_inference(images, features, outputs)


@pytest.mark.parametrize("name", ["atss", "gfl", "fcos"])
def test_boxes_outside_of_the_image_take_no_places(name):
    """All best scores lie in what pads the image: clipping leaves nothing of their boxes."""
    detector = original_detector(name)
    features, outputs = predictions(detector)
    outputs[0][0][0, 0, :, 20:] = 3.0  # right of pixel 160, in level P3
    outputs[0][0][0, 1, 4, 4] = 1.0
    if name == "atss":  # anchors are wide: boxes of 1 / 16 of them
        for x in outputs[1]:
            x[:, :2], x[:, 2:] = 0.0, -14.0
    else:
        outputs[1][0][:] = 0.0 if name == "fcos" else -9.0
        if name == "gfl":
            outputs[1][0].view(2, 4, 17, 16, 24)[:, :, 1] = 9.0
        else:
            outputs[1][0][:] = 3.0
    detector.max_detections_per_image = 2
    first, second = detect(detector, features, outputs, size=(128, 96))
    assert first.pred_classes.tolist() == [1]
    assert first.pred_boxes.nonempty().all() and len(second) == 0


@pytest.mark.parametrize("name", ["atss", "gfl", "fcos"])
def test_as_many_candidates_per_level_as_the_config_says(name):
    detector = original_detector(name)
    features, outputs = predictions(detector, logits=1.0)
    outputs[0] = [x + torch.rand_like(x) for x in outputs[0]]
    detector.test_nms_thresh, detector.max_detections_per_image = 1.0, 10_000
    sizes = [x[0].numel() for x in outputs[0]]
    for k in (7, 1000):
        detector.test_topk_candidates = k
        first, _ = detect(detector, features, outputs)
        assert len(first) == sum(min(k, size) for size in sizes)
    best = torch.cat(
        [x[0].flatten().sigmoid().topk(min(k, x[0].numel())).values for x in outputs[0]]
    )
    if name == "gfl":
        assert torch.allclose(first.scores.sort().values, best.sort().values)

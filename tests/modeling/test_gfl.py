"""GFL: its losses and its box coding against the original."""

import pytest
import torch
from dense_cases import array, check_end_to_end, original_detector, pyramid_features
from detectron2.structures import ImageList

from d2kd.layers import distribution_focal_loss, one_hot, quality_focal_loss
from d2kd.modeling.meta_arch.integral import IntegralBoxTransform, integral

TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def test_quality_focal_loss_equals_the_original():
    quality = one_hot(array("qfl/label_5isbg"), 5) * array("qfl/score")[:, None]
    rowwise = quality_focal_loss(array("qfl/pred_logits"), quality).sum(dim=1)
    assert torch.allclose(rowwise, array("qfl/rowwise"), **TIGHT)
    total = (rowwise * array("qfl/weight")).sum() / 4
    assert torch.allclose(total, array("qfl/loss_w_avg4"), rtol=1e-6)  # theirs divides by 4 + 1e-7


def test_distribution_focal_loss_equals_the_original():
    rowwise = distribution_focal_loss(array("dfl/pred_logits"), array("dfl/target"))
    assert torch.allclose(rowwise, array("dfl/rowwise"), **TIGHT)
    total = 0.25 * (rowwise * array("dfl/weight")).sum() / 4
    assert torch.allclose(total, array("dfl/loss_lw0p25_w_avg4"), rtol=1e-6)


@pytest.mark.parametrize("loss", [quality_focal_loss, distribution_focal_loss])
def test_gradients_of_the_losses(loss):
    torch.manual_seed(0)
    logits = torch.randn(4, 7, dtype=torch.double, requires_grad=True)
    target = torch.rand(4, 7) if loss is quality_focal_loss else torch.rand(4) * 5.9
    assert torch.autograd.gradcheck(lambda x: loss(x, target.double()), logits)


def test_quality_focal_loss_is_zero_when_the_score_is_the_quality():
    logits = torch.tensor([-2.0, 0.0, 3.0])
    assert quality_focal_loss(logits, logits.sigmoid()).abs().max() < 1e-12


def test_integral_equals_the_original():
    out = integral(array("integral/in_N_68"), 17)
    assert torch.allclose(out, array("integral/out_N_4"), rtol=1e-6)  # the original is in float32


def test_integral_says_every_shape():
    """What ONNX needs for images without candidates; the numbers are those of the plain formula."""
    torch.manual_seed(0)
    for shape in ((7, 68), (2, 5, 68), (3, 17)):
        logits = torch.randn(shape)
        p = logits.reshape(*shape[:-1], -1, 17).softmax(dim=-1)
        assert torch.equal(integral(logits, 17), (p * torch.arange(17.0)).sum(dim=-1))
    assert integral(torch.zeros(0, 68), 17).shape == (0, 4)


def squares(points, width):
    return torch.cat([points - width / 2, points + width / 2], dim=-1)


def test_box_coding_equals_the_original():
    coding = IntegralBoxTransform(reg_max=16, anchor_scale=8)
    points = squares(array("dist/points"), 8.0)  # a stride of 1 px
    assert torch.allclose(
        coding.get_deltas(points, array("dist/enc_boxes")), array("dist/enc_ltrb_maxdis16"), **TIGHT
    )


def test_decoding_inverts_encoding():
    coding = IntegralBoxTransform(reg_max=16, anchor_scale=8)
    anchors = squares(torch.tensor([[64.0, 40.0], [96.0, 72.0]]), 8.0 * 16)
    boxes = torch.tensor([[10.0, 8.0, 90.0, 60.0], [64.0, 24.0, 192.0, 136.0]])
    distances = coding.get_deltas(anchors, boxes)
    # all probability on the two bins around each distance
    bins = torch.arange(17.0)
    logits = (1 - (distances[..., None] - bins).abs()).clamp(min=1e-12).log().flatten(1)
    assert torch.allclose(coding.apply_deltas(logits, anchors), boxes, atol=1e-3)


def test_confident_boxes_weigh_more():
    detector = original_detector("gfl")
    anchors = squares(torch.tensor([[64.0, 64.0], [64.0, 64.0]]), 64.0)
    gt_boxes = torch.tensor([[[44.0, 44.0, 84.0, 84.0], [44.0, 44.0, 84.0, 84.0]]])
    logits = torch.full((1, 2, 5), -9.0)
    distances = torch.tensor([[[16], [2]]]).expand(1, 2, 4)  # 2.5 strides would be right
    deltas = 9.0 * one_hot(distances, 17).flatten(2)
    args = (anchors, torch.zeros(1, 2).long(), gt_boxes)
    losses = []
    for confident in range(2):
        logits[0, :, 0] = -9.0
        logits[0, confident, 0] = 9.0
        losses.append(detector.losses(*args, logits, deltas)["loss_box_reg"])
    assert losses[0] > 1.2 * losses[1]  # the first box is the worse one


def test_score_is_the_class_quality_alone():
    detector = original_detector("gfl")
    features = pyramid_features()
    predictions = [
        [torch.full((1, c, *x.shape[-2:]), v) for x in features] for c, v in ((5, -9.0), (68, 0.0))
    ]
    predictions[0][0][0, 1, 6, 7] = 1.5
    images = ImageList(torch.zeros(1, 3, 128, 192), [(128, 192)])
    (found,) = detector.forward_inference(images, features, predictions)
    assert torch.allclose(found.scores, torch.tensor([1.5]).sigmoid())
    # flat distributions: 8 strides of 8 px around (56, 48), clipped to the image
    assert torch.allclose(found.pred_boxes.tensor, torch.tensor([[0.0, 0.0, 120.0, 112.0]]))


def test_equals_the_original_end_to_end():
    check_end_to_end("gfl")

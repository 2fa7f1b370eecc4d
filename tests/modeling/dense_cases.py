"""Small dense detectors, and the numbers of the original implementation for their tests."""

import os

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from toys import config

from d2kd.modeling.meta_arch import ATSS, GFL, PaperFCOS
from d2kd.modeling.meta_arch.integral import IntegralBoxTransform
from d2kd.modeling.meta_arch.paper_fcos import PaperFCOSHead
from d2kd.modeling.meta_arch.scaled_head import ScaledHead

_REFERENCE = os.path.join(os.environ.get("D2KD_REFERENCE", ""), "crosskd.npz")
_GOLDEN = os.path.join(os.path.dirname(__file__), "golden", "dense_detectors.npz")
_ARRAYS = np.load(_REFERENCE if os.path.isfile(_REFERENCE) else _GOLDEN)

LEVELS = range(5)
# The original's names of losses and of prediction convs
ORIGINAL = {
    "atss": (
        {"loss_cls": "loss_cls", "loss_box_reg": "loss_bbox", "loss_centerness": "loss_centerness"},
        {"atss_cls": "cls_score", "atss_reg": "bbox_pred", "atss_centerness": "ctrness"},
    ),
    "gfl": (
        {"loss_cls": "loss_cls", "loss_box_reg": "loss_bbox", "loss_dfl": "loss_dfl"},
        {"gfl_cls": "cls_score", "gfl_reg": "bbox_pred"},
    ),
    "fcos": (
        {
            "loss_fcos_cls": "loss_cls",
            "loss_fcos_loc": "loss_bbox",
            "loss_fcos_ctr": "loss_centerness",
        },
        {"conv_cls": "cls_score", "conv_reg": "bbox_pred", "conv_centerness": "ctrness"},
    ),
}


def tiny_config(architecture, opts=()):
    """A config of a small detector on the small backbone, 6 classes."""
    node = "FCOS" if architecture == "PaperFCOS" else architecture
    return config(
        "shapes/baselines/fcos_tiny.yaml",
        ["MODEL.META_ARCHITECTURE", architecture, f"MODEL.{node}.NUM_CLASSES", 6]
        + [f"MODEL.{node}.NUM_CONVS", 1, "MODEL.FPN.OUT_CHANNELS", 64, *opts],
    )


def array(key):
    """A stored tensor of the original implementation."""
    return torch.from_numpy(_ARRAYS[key])


def all_levels(key, dim=1):
    """The tensors ``<key>_l0`` ... ``<key>_l4`` one after the other."""
    return torch.cat([array(f"{key}_l{level}") for level in LEVELS], dim=dim)


def relative_error(value, expected):
    """Largest deviation, relative to the largest number expected."""
    return ((value - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


class FixedPyramid(nn.Module):
    """In place of a backbone: only the shapes of P3 to P7 with 32 channels."""

    size_divisibility = 32

    def output_shape(self):
        return {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in range(3, 8)}


def original_detector(name):
    """The detector of the end-to-end cases, untrained: 5 classes, 4 blocks, GN of 8 groups."""
    backbone = FixedPyramid()
    head = {
        "input_shape": list(backbone.output_shape().values()),
        "num_classes": 5,
        "conv_dims": [32] * 4,
        "norm": lambda channels: nn.GroupNorm(8, channels),
    }
    common = {"backbone": backbone, "num_classes": 5, "pixel_mean": [0.0], "pixel_std": [1.0]}
    if name == "gfl":
        transform = IntegralBoxTransform(reg_max=16)
        return GFL(head=ScaledHead(box_dim=68, **head), box2box_transform=transform, **common)
    if name == "atss":
        transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
        head = ScaledHead(centerness_branch="bbox", **head)
        return ATSS(head=head, box2box_transform=transform, **common)
    return PaperFCOS(head=PaperFCOSHead(**head), **common)


def original_ground_truth():
    """Two images; the first fills the padded batch of 128 x 192, the second 96 x 160 of it."""
    result = []
    for i in range(2):
        height, width = array(f"e2e/common/pad_shape_hw_img{i}").tolist()
        gt = Instances((height, width))
        gt.gt_boxes = Boxes(array(f"e2e/common/gt_boxes_img{i}"))
        gt.gt_classes = array(f"e2e/common/gt_labels_img{i}")
        result.append(gt)
    return result


def pyramid_features():
    """Feature maps of the sizes of the end-to-end cases, where only the size matters."""
    return [torch.zeros(2, 32, *size) for size in ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))]


def check_end_to_end(name):
    """Head outputs, losses and gradients of a detector with the original's weights and inputs."""
    case = f"e2e/{name}/"
    if not any(key.startswith(case) for key in _ARRAYS):
        pytest.skip(f"{case} is not among the numbers at hand")
    detector = original_detector(name)
    losses_by_name, predictors = ORIGINAL[name]
    _load_original_weights(detector.head, case + "weights_student/", predictors)
    features = [array(f"e2e/common/student_fpn_l{i}").requires_grad_() for i in LEVELS]
    gt = original_ground_truth()
    images = ImageList(torch.zeros(2, 3, 128, 192), [x.image_size for x in gt])

    outputs = detector.head(features)
    for ours, theirs in zip(outputs, ("cls_logits", "reg", "centerness")):
        for i in LEVELS:
            assert relative_error(ours[i], array(f"{case}student_{theirs}_l{i}")) < 1e-4
    losses = detector.forward_training(images, features, outputs, gt)
    assert losses.keys() == losses_by_name.keys()
    for key, original in losses_by_name.items():
        assert relative_error(losses[key], array(f"{case}official/loss_total/{original}")) < 1e-4
    sum(losses.values()).backward()
    for i in LEVELS:
        expected = array(f"{case}official/det_grad_student_fpn_l{i}")
        assert relative_error(features[i].grad, expected) < 1e-4


def _load_original_weights(head, prefix, predictors):
    # The original's tower convolutions have no bias.
    state = {k: torch.zeros_like(v) for k, v in head.state_dict().items()}
    for key in (k for k in _ARRAYS if k.startswith(prefix)):
        module, *rest = key[len(prefix) :].split(".")
        if module == "scales":
            state["scales"][int(rest[0])] = array(key)
        elif module in predictors:
            state[f"{predictors[module]}.{rest[-1]}"] = array(key)
        else:
            tower = {"cls_convs": "cls_subnet", "reg_convs": "bbox_subnet"}[module]
            block, layer, parameter = rest
            state[f"{tower}.{3 * int(block) + (layer == 'gn')}.{parameter}"] = array(key)
    head.load_state_dict(state)

"""Two heads on fixed FPN levels, and the end-to-end cases of CrossKD's original code for them."""

import json
import math
import os

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import Boxes, Instances
from torch import nn

from d2kd.distillation import Teacher, TeacherStudent
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.methods.core import TermSchedule
from d2kd.modeling.meta_arch import ATSS, GFL, PaperFCOS
from d2kd.modeling.meta_arch.integral import IntegralBoxTransform
from d2kd.modeling.meta_arch.paper_fcos import PaperFCOSHead
from d2kd.modeling.meta_arch.scaled_head import ScaledHead
from d2kd.views import build_family

_REFERENCE = os.path.join(os.environ.get("D2KD_REFERENCE", ""), "crosskd.npz")
_GOLDEN = os.path.join(os.path.dirname(__file__), "golden", "crosskd.npz")
ARRAYS = dict(np.load(_REFERENCE if os.path.isfile(_REFERENCE) else _GOLDEN))


def _unpack(path):
    """Arrays by name from two long ones, of whole numbers (over a divisor) and of floats."""
    packed = np.load(path)
    blobs = {name: packed[name] for name in ("whole", "floats")}
    index = json.loads(packed["index"].tobytes())
    arrays = {key: np.array(names) for key, names in index["names"].items()}
    for key, (blob, start, shape, divisor, kind) in index["arrays"].items():
        array = blobs[blob][start : start + math.prod(shape)].reshape(shape) / divisor
        arrays[key] = array.astype(np.int64 if kind == "i" and divisor == 1 else np.float32)
    return arrays


# The original's end-to-end cases: those of the reference folder, of 32 channels, and small ones
# that come with the tests: jbwang1997/CrossKD 87e156a run with torch 2.11 and mmcv-lite 2.0.0 on
# heads of 4 channels, whose random weights are multiples of 1/64 (FPN levels: of 1/32)
END_TO_END = {
    "golden": _unpack(os.path.join(os.path.dirname(_GOLDEN), "crosskd_end_to_end.npz")),
    "reference": ARRAYS,
}

STRIDES = (8, 16, 32, 64, 128)
LEVELS = range(len(STRIDES))
CLASSES, CHANNELS = 5, 32
# The original's names of prediction convs
PREDICTORS = {
    "gfl_cls": "cls_score",
    "gfl_reg": "bbox_pred",
    "retina_cls": "cls_score",
    "retina_reg": "bbox_pred",
    "atss_cls": "cls_score",
    "atss_reg": "bbox_pred",
    "atss_centerness": "ctrness",
    "conv_cls": "cls_score",
    "conv_reg": "bbox_pred",
    "conv_centerness": "ctrness",
}
# Term weights and depth of the released configs
WEIGHTS = {
    "gfl": {"cls": 1.0, "bbox": 4.0},
    "retinanet": {"cls": 1.0, "bbox": 1.0},
    "atss": {"cls": 1.0, "bbox": 1.0, "centerness": 1.0},
    "fcos": {"cls": 0.4, "bbox": 0.75},
}
DEPTHS = {"gfl": 3, "retinanet": 3, "atss": 3, "fcos": 2}
# The original's names of terms, and of the losses of the student alone
ORIGINAL_TERMS = {"cls": "loss_cls_kd", "bbox": "loss_reg_kd", "centerness": "losses_center_kd"}
ORIGINAL_LOSSES = {
    "gfl": {"loss_cls": "loss_cls", "loss_box_reg": "loss_bbox", "loss_dfl": "loss_dfl"},
    "retinanet": {},  # Detectron2's divides by a moving average
    "atss": {
        "loss_cls": "loss_cls",
        "loss_box_reg": "loss_bbox",
        "loss_centerness": "loss_centerness",
    },
    "fcos": {
        "loss_fcos_cls": "loss_cls",
        "loss_fcos_loc": "loss_bbox",
        "loss_fcos_ctr": "loss_centerness",
    },
}


def array(key, source="reference"):
    """A stored tensor."""
    return torch.from_numpy(np.asarray(END_TO_END[source][key]))


def relative_error(value, expected):
    """Largest deviation, relative to the largest number expected."""
    return ((value - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


class FixedPyramid(nn.Module):
    """In place of a backbone: gives the same FPN levels, whatever the image."""

    size_divisibility = 32
    padding_constraints = {}

    def __init__(self, levels):
        super().__init__()
        self.levels = nn.ParameterList(nn.Parameter(x.clone()) for x in levels)

    def output_shape(self):
        channels = self.levels[0].shape[1]
        return {f"p{i + 3}": ShapeSpec(channels=channels, stride=s) for i, s in enumerate(STRIDES)}

    def forward(self, images):
        return {f"p{i + 3}": level for i, level in enumerate(self.levels)}


def _retinanet(backbone, head, common):
    anchors = DefaultAnchorGenerator(
        sizes=[[4 * s * 2 ** (i / 3) for i in range(3)] for s in STRIDES],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=STRIDES,
        offset=0.0,
    )
    return RetinaNet(
        head=RetinaNetHead(num_anchors=9, **{**head, "norm": ""}),
        anchor_generator=anchors,
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        head_in_features=list(backbone.output_shape()),
        **common,
    )


def random_levels(seed, channels=CHANNELS, images=2, height=128, width=192):
    """P3 to P7 of a batch of that size, in pixels."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(-(-height // s), -(-width // s)) for s in STRIDES]
    return [torch.randn(images, channels, *size, generator=generator) for size in sizes]


def small_detector(name, levels, seed, blocks=4, classes=CLASSES):
    """A detector with random weights on fixed levels; "gfl", "retinanet", "atss" or "fcos"."""
    torch.manual_seed(seed)
    detector = _build(name, FixedPyramid(levels), blocks, classes)
    for parameter in detector.head.parameters():
        if parameter.dim() == 4:
            nn.init.normal_(parameter, std=0.1)
    return detector


def original_detector(name, who, source="reference"):
    """A detector with the original's weights on its stored levels, as "student" or "teacher"."""
    levels = [array(f"e2e/common/{who}_fpn_l{i}", source) for i in LEVELS]
    detector = _build(name, FixedPyramid(levels))
    _load_weights(detector.head, f"e2e/{name}/weights_{who}/", source)
    return detector


def _build(name, backbone, blocks=4, classes=CLASSES):
    shapes = list(backbone.output_shape().values())
    head = {
        "input_shape": shapes,
        "num_classes": classes,
        "conv_dims": [shapes[0].channels] * blocks,
        "norm": lambda channels: nn.GroupNorm(2 if channels == 4 else 8, channels),
    }
    common = {
        "backbone": backbone,
        "num_classes": classes,
        "pixel_mean": [0.0] * 3,
        "pixel_std": [1.0] * 3,
    }
    if name == "retinanet":
        return _retinanet(backbone, head, common)
    if name == "gfl":
        return GFL(
            head=ScaledHead(box_dim=68, **head),
            box2box_transform=IntegralBoxTransform(reg_max=16),
            **common,
        )
    if name == "atss":
        return ATSS(
            head=ScaledHead(centerness_branch="bbox", **head),
            box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
            **common,
        )
    return PaperFCOS(head=PaperFCOSHead(**head), **common)


def our_parameter(name, with_norm):
    """The original's name of a head parameter -> ours; scales have their level in brackets."""
    module, *rest = name.split(".")
    if module == "scales":
        return f"scales[{rest[0]}]"
    if module in PREDICTORS:
        return f"{PREDICTORS[module]}.{rest[-1]}"
    tower = {"cls_convs": "cls_subnet", "reg_convs": "bbox_subnet"}[module]
    block, layer, parameter = rest
    index = int(block) * (3 if with_norm else 2) + (layer == "gn")
    return f"{tower}.{index}.{parameter}"


def _load_weights(head, prefix, source):
    # The original's tower convolutions have no bias before a norm.
    state = {k: torch.zeros_like(v) for k, v in head.state_dict().items()}
    for key in (k for k in END_TO_END[source] if k.startswith(prefix)):
        name, value = our_parameter(key[len(prefix) :], hasattr(head, "scales")), array(key, source)
        if name.startswith("scales"):
            state["scales"][int(name[7:-1])] = value
        else:
            state[name] = _detectron2_order(value, state[name].shape, "retina_" in key)
    head.load_state_dict(state)


def _detectron2_order(weight, shape, reorder):
    """The original's 9 anchors go by ratio, then size; Detectron2's by size, then ratio."""
    if reorder:
        weight = weight.unflatten(0, (3, 3, -1)).transpose(0, 1)
    return weight.reshape(shape)


def original_batch(with_objects=True, source="reference"):
    """Two images; the first fills the padded batch (128 x 192 or 96 x 160), the second a part."""
    batch = []
    for i in range(2):
        height, width = array(f"e2e/common/pad_shape_hw_img{i}", source).tolist()
        instances = Instances((height, width))
        keep = slice(None) if with_objects else slice(0)
        instances.gt_boxes = Boxes(array(f"e2e/common/gt_boxes_img{i}", source)[keep])
        instances.gt_classes = array(f"e2e/common/gt_labels_img{i}", source)[keep]
        batch.append({"image": torch.zeros(3, height, width), "instances": instances})
    return batch


def small_pair(name, seed=0, **kwargs):
    """Student and teacher with random weights on random levels."""
    return [small_detector(name, random_levels(seed + i), seed + i, **kwargs) for i in range(2)]


def distilled(name, student, teacher, opts=(), method="CrossKD"):
    """A student under a method, with the weights and the depth of the released config.

    Args:
        name: "gfl", "retinanet", "atss" or "fcos".
        student, teacher: detectors.
        opts: keys of the method and their values, in pairs.
        method: name of the method.
    """
    cls = DISTILLER_REGISTRY.get(method)
    node = cls.default_config()
    if "DEPTH" in node:
        node.DEPTH = DEPTHS[name]
    for term, weight in WEIGHTS[name].items():
        node[term.upper()].WEIGHT = weight
    node.merge_from_list(list(opts))
    cls.check_config(node)
    teacher = Teacher(teacher, input_format="BGR", student=student, student_format="BGR")
    pair = build_family(student), teacher.family
    distiller = cls(node, *pair)
    terms = distiller.terms
    return TeacherStudent(
        student=student,
        teacher=teacher,
        distillers={method: distiller},
        reads={(method, t): r for t, r in cls.reads(node, *pair).items()},
        schedules={
            (method, t): TermSchedule.from_config(node[t.upper()], max_iter=90000) for t in terms
        },
    )

"""The settings that a file of MMDetection was trained with, in Detectron2's words.

Names and shapes of tensors do not tell pixels, the stride's place, the ReLU before P7, anchors or
classes; the config in the file's ``meta`` does.
"""

import logging
from typing import Any, Dict, Mapping, Optional

from .mmdet_config import node, read_config

logger = logging.getLogger(__name__)

# A setting is named by the config key that changes it, where there is one.
FORMAT, MEAN, STD = "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
P6, RELU = "P6 (MODEL.BACKBONE.NAME)", "MODEL.FPN.RELU_BEFORE_P7"
BOX_WEIGHTS = "BBOX_REG_WEIGHTS"
SIZES, RATIOS = "MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
FCOS_OPTIONS = "options of FCOS's head"
CLASSES = "classes"

POOLED, FROM_RES5, FROM_P5 = "P5, pooled", "a convolution of res5", "a convolution of P5"
_P6_SOURCES = {
    False: POOLED,
    True: FROM_RES5,
    "on_input": FROM_RES5,
    "on_output": FROM_P5,
    "on_lateral": "a convolution of P5's lateral",
}

_MOST_SCALES = 100  # per octave

Settings = Dict[str, Any]


def file_settings(meta: Optional[Mapping]) -> Settings:
    """
    Args:
        meta: of a file of MMDetection, if it has one.

    Returns:
        what it tells, by the names above: pixels, where a ResNet has its strides, P6, the ReLU
        before P7, weights of box deltas, anchors, options of FCOS, classes.
    """
    meta = meta if isinstance(meta, dict) else {}
    try:
        config = read_config(meta)
        model = node(config, "model")
        head = model.get("bbox_head") or node(model, "roi_head").get("bbox_head") or {}
        heads = head if isinstance(head, list) else [head]
        settings = {
            **_pixels(node(model, "data_preprocessor") or _find_normalize(config)),
            **_backbone(node(model, "backbone")),
            **_neck(node(model, "neck")),
            **_heads(heads),
            **_anchors(
                node(model, "rpn_head", "anchor_generator") or node(heads[0], "anchor_generator")
            ),
        }
    except Exception as e:  # a config that no version of MMDetection writes
        logger.warning(f"The config in the file's meta cannot be understood ({e!r})")
        settings = {}
    classes = meta.get("CLASSES") or node(meta, "dataset_meta").get("classes")
    if isinstance(classes, str):  # MMDetection allows that for one class
        classes = [classes]
    is_list = isinstance(classes, (list, tuple)) and all(isinstance(x, str) for x in classes)
    return {**settings, CLASSES: list(classes)} if classes and is_list else settings


def _find_normalize(config: Any) -> Mapping:
    """2.x: the first ``dict(type='Normalize', mean=..., std=..., to_rgb=...)`` of a pipeline."""
    if isinstance(config, dict) and config.get("type") == "Normalize":
        return {"bgr_to_rgb": config.get("to_rgb", True), **config}
    values = config.values() if isinstance(config, dict) else config
    if not isinstance(config, (dict, list)):
        return {}
    return next(filter(None, map(_find_normalize, values)), {})


def _pixels(normalize: Mapping) -> Settings:
    if "mean" not in normalize:
        return {}
    return {
        FORMAT: "RGB" if normalize.get("bgr_to_rgb", False) else "BGR",
        MEAN: list(normalize["mean"]),
        STD: list(normalize["std"]),
    }


def _backbone(backbone: Mapping) -> Settings:
    if backbone.get("type") not in ("ResNet", "ResNeXt"):
        return {}
    return {STRIDE: backbone.get("style", "pytorch") == "caffe"}


def _neck(neck: Mapping) -> Settings:
    if neck.get("type") != "FPN":
        return {}
    extra = neck.get("add_extra_convs", False)
    relu = {RELU: neck.get("relu_before_extra_convs", False)} if extra else {}
    return {P6: _P6_SOURCES[extra], **relu}


def _heads(heads: list) -> Settings:
    """Of the one head, or of the box heads of a cascade."""
    settings = {}
    stds = [node(head, "bbox_coder").get("target_stds") for head in heads]
    if all(stds):
        settings[BOX_WEIGHTS] = [[1 / s for s in of_one] for of_one in stds]
    if heads[0].get("type") == "FCOSHead":
        options = ("norm_on_bbox", "centerness_on_reg")
        settings[FCOS_OPTIONS] = [x for x in options if heads[0].get(x)]
    return settings


def _anchors(generator: Mapping) -> Settings:
    if generator.get("type") != "AnchorGenerator":
        return {}
    count = min(generator.get("scales_per_octave", 0), _MOST_SCALES)
    octave = [generator["octave_base_scale"] * 2 ** (i / count) for i in range(count)]
    scales = generator.get("scales") or octave
    return {
        SIZES: [[stride * scale for scale in scales] for stride in generator["strides"]],
        RATIOS: list(generator["ratios"]),
    }

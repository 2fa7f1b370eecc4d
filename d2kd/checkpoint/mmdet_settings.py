"""The settings that a file of MMDetection was trained with, in Detectron2's words.

Names and shapes of tensors do not tell pixels, the stride's place, the ReLU before P7, anchors or
classes; the config in the file's ``meta`` does.
"""

import logging
import math
from typing import Any, Dict, List, Mapping, Optional

from .mmdet_config import node, read_config

logger = logging.getLogger(__name__)

# A setting is named by the config key that changes it, where there is one.
FORMAT, MEAN, STD = "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
RES5_STRIDE, DILATION = "stride of res5", "MODEL.RESNETS.RES5_DILATION"
P6, RELU = "P6 (MODEL.BACKBONE.NAME)", "MODEL.FPN.RELU_BEFORE_P7"
UPSAMPLING = "upsampling of the FPN"
GROUPS, FCOS_OPTIONS = "groups of the head's GroupNorm", "options of FCOS's head"
BOX_WEIGHTS, RPN_WEIGHTS = "BBOX_REG_WEIGHTS", "MODEL.RPN.BBOX_REG_WEIGHTS"
CODERS, MEANS = "coders of the boxes", "means of the box deltas"
SIZES, RATIOS = "MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
OFFSET, GENERATOR = "MODEL.ANCHOR_GENERATOR.OFFSET", "kind of the anchors"
POOLER = "MODEL.ROI_BOX_HEAD.POOLER_TYPE"
SAMPLING = "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO"
CLASSES = "classes"
# Settings that no config of d2kd or Detectron2 changes
FIXED = (UPSAMPLING, GROUPS, FCOS_OPTIONS, CODERS, MEANS, GENERATOR)

POOLED = "P5, pooled, as build_resnet_fpn_backbone makes it"
FROM_RES5 = "a convolution of res5, as build_retinanet_resnet_fpn_backbone makes it"
FROM_P5 = "a convolution of P5, as build_resnet_fpn_p6p7_backbone makes it"
_P6_SOURCES = {
    False: POOLED,
    True: FROM_RES5,
    "on_input": FROM_RES5,
    "on_output": FROM_P5,
    "on_lateral": "a convolution of P5's lateral",
}
DELTAS, DELTAS_OF_1_X = "DeltaXYWHBBoxCoder", "LegacyDeltaXYWHBBoxCoder"
ANCHORS, ANCHORS_OF_1_X = "AnchorGenerator", "LegacyAnchorGenerator"
NEAREST = "nearest"
_GROUPS = 32  # of the heads that have GroupNorm, unless the config says otherwise

_MAX_SCALES = 100  # per octave

Settings = Dict[str, Any]


def file_settings(meta: Optional[Mapping]) -> Settings:
    """
    Args:
        meta: of a file of MMDetection, if it has one.

    Returns:
        what it tells, by the names above. What cannot be understood is left out.
    """
    meta = meta if isinstance(meta, dict) else {}
    config = read_config(meta)
    settings: Settings = {}
    for part in (_pixels, _backbone, _neck, _head, _coders, _anchors, _regions):
        try:
            settings.update(part(config))
        except Exception as e:  # a config that no version of MMDetection writes
            logger.warning(f"The config in the file's meta cannot be understood ({e!r})")
    return {**settings, **_classes(meta)}


def _classes(meta: Mapping) -> Settings:
    of_data = node(meta, "dataset_meta")  # its key is CLASSES in the first ones of 3.0
    classes = meta.get("CLASSES") or of_data.get("classes") or of_data.get("CLASSES")
    if isinstance(classes, str):  # MMDetection allows that for one class
        classes = [classes]
    is_list = isinstance(classes, (list, tuple)) and all(isinstance(x, str) for x in classes)
    return {CLASSES: list(classes)} if classes and is_list else {}


def _type(part: Mapping) -> str:
    """Without the module or the scope, as in mmdet.ResNet."""
    return str(part.get("type", "")).rpartition(".")[2]


def _pixels(config: Mapping) -> Settings:
    normalize = node(config, "model", "data_preprocessor") or _find_normalize(config)
    if "mean" not in normalize:
        return {}
    return {
        FORMAT: "RGB" if normalize.get("bgr_to_rgb", False) else "BGR",
        MEAN: list(normalize["mean"]),
        STD: list(normalize["std"]),
    }


def _find_normalize(config: Any) -> Mapping:
    """2.x: the first ``dict(type='Normalize', mean=..., std=..., to_rgb=...)`` of a pipeline."""
    if isinstance(config, dict) and config.get("type") == "Normalize":
        return {"bgr_to_rgb": config.get("to_rgb", True), **config}
    values = config.values() if isinstance(config, dict) else config
    if not isinstance(config, (dict, list)):
        return {}
    return next(filter(None, map(_find_normalize, values)), {})


def _backbone(config: Mapping) -> Settings:
    backbone = node(config, "model", "backbone")
    if _type(backbone) not in ("ResNet", "ResNeXt"):
        return {}
    return {
        STRIDE: backbone.get("style", "pytorch") == "caffe",
        RES5_STRIDE: 4 * math.prod(backbone.get("strides", [1, 2, 2, 2])),
        DILATION: backbone.get("dilations", [1])[-1],
    }


def _neck(config: Mapping) -> Settings:
    neck = node(config, "model", "neck")
    if _type(neck) != "FPN":
        return {}
    extra = neck.get("add_extra_convs", False)
    if extra is True and not neck.get("extra_convs_on_inputs", True):  # as 2.0 says it
        extra = "on_output"
    relu = {RELU: neck.get("relu_before_extra_convs", False)} if extra else {}
    upsampling = node(neck, "upsample_cfg").get("mode", NEAREST)
    return {P6: _P6_SOURCES[extra], **relu, UPSAMPLING: upsampling}


def _box_heads(config: Mapping) -> List[Mapping]:
    """The one of a detector, or those of a cascade."""
    model = node(config, "model")
    head = model.get("bbox_head") or node(model, "roi_head").get("bbox_head") or {}
    return head if isinstance(head, list) else [head]


def _head(config: Mapping) -> Settings:
    head = node(config, "model", "bbox_head")
    if not _type(head):
        return {}
    settings: Settings = {GROUPS: node(head, "norm_cfg").get("num_groups", _GROUPS)}
    if _type(head) == "FCOSHead":
        options = ("norm_on_bbox", "centerness_on_reg")
        settings[FCOS_OPTIONS] = [x for x in options if head.get(x)]
    return settings


def _coders(config: Mapping) -> Settings:
    """How box deltas become boxes."""
    heads = _box_heads(config)
    if any("anchor_ratios" in head for head in heads):  # 1.x
        return {CODERS: [DELTAS_OF_1_X]}
    rpn = node(config, "model", "rpn_head", "bbox_coder")
    coders = [node(head, "bbox_coder") for head in heads]
    known = [coder for coder in (rpn, *coders) if _type(coder)]
    if not known:
        return {}
    settings: Settings = {CODERS: sorted({_type(coder) for coder in known})}
    if settings[CODERS] == [DELTAS]:
        means = [list(coder["target_means"]) for coder in known if "target_means" in coder]
        settings[MEANS] = next((x for x in means if any(x)), [0.0] * 4)
        if all(map(_type, coders)):
            settings[BOX_WEIGHTS] = one_or_all([_weights(coder) for coder in coders])
        if _type(rpn):
            settings[RPN_WEIGHTS] = _weights(rpn)
    return settings


def one_or_all(weights: List[List[float]]) -> List:
    """Of the box heads of a cascade all, as its config key has them."""
    return weights[0] if len(weights) == 1 else weights


def _weights(coder: Mapping) -> List[float]:
    return [1 / s for s in coder.get("target_stds", [1.0] * 4)]


def _anchors(config: Mapping) -> Settings:
    rpn = node(config, "model", "rpn_head", "anchor_generator")
    generator = rpn or node(_box_heads(config)[0], "anchor_generator")
    if _type(generator) not in (ANCHORS, ANCHORS_OF_1_X):
        return {}
    count = min(generator.get("scales_per_octave") or 0, _MAX_SCALES)
    octave = [generator["octave_base_scale"] * 2 ** (i / count) for i in range(count)]
    scales = generator.get("scales") or octave
    sides = generator.get("base_sizes") or generator["strides"]
    sides = [side[0] if isinstance(side, list) else side for side in sides]
    return {
        SIZES: [[side * scale for scale in scales] for side in sides],
        RATIOS: list(generator["ratios"]),
        OFFSET: generator.get("center_offset", 0.0),
        GENERATOR: _type(generator),
    }


def _regions(config: Mapping) -> Settings:
    """How features of a box are cut out."""
    extractor = node(config, "model", "roi_head").get("bbox_roi_extractor") or {}
    first = extractor[0] if isinstance(extractor, list) else extractor
    layer = node(first, "roi_layer")
    if _type(layer) != "RoIAlign":
        return {}
    return {
        POOLER: "ROIAlignV2" if layer.get("aligned", True) else "ROIAlign",
        SAMPLING: layer.get("sampling_ratio", 0),
    }

"""Config keys of the dense detectors and of the small backbones, below ``MODEL``."""

from dataclasses import replace
from typing import Dict

from detectron2.config import CfgNode

from d2kd.schema import Key, Keys, config_node

_NUM_CLASSES = Key(80, "Number of classes, background excluded", low=1, high=100_000)


def _head_keys(score_thresh: float) -> Dict[str, Key]:
    """What FCOS, ATSS and GFL have in common, named as in ``MODEL.RETINANET``."""
    return {
        "NUM_CLASSES": _NUM_CLASSES,
        "IN_FEATURES": Key(
            ["p3", "p4", "p5", "p6", "p7"], "FPN levels that the head reads, finest first"
        ),
        "NUM_CONVS": Key(4, "Blocks (conv, norm, ReLU) in each of the two towers", low=0, high=64),
        "NORM": Key("GN", 'Norm of the towers: "", "GN", "BN", ...; GN makes 32 groups'),
        "PRIOR_PROB": Key(
            0.01,
            "Class probability that an untrained head predicts everywhere",
            low=1e-6,
            high=1 - 1e-6,
        ),
        "SCORE_THRESH_TEST": Key(score_thresh, "Lowest score of a detection", low=0, high=1),
        "TOPK_CANDIDATES_TEST": Key(
            1000, "Predictions of one level that go into NMS, at most", low=1
        ),
        "NMS_THRESH_TEST": Key(
            0.6,
            "IoU above which NMS removes the lower-scoring box of a class",
            low=0,
            high=1,
        ),
    }


_FOCAL_LOSS = {
    "FOCAL_LOSS_ALPHA": Key(0.25, "Weight of positives in the class loss", low=0, high=1),
    "FOCAL_LOSS_GAMMA": Key(2.0, "How fast easy examples lose weight", low=0, high=100),
}

FCOS_KEYS: Keys = {
    **_head_keys(score_thresh=0.2),
    "CENTER_SAMPLING_RADIUS": Key(
        1.5,
        "Radius, in strides, of the central region of a box where locations are positive",
        low=0,
    ),
    **_FOCAL_LOSS,
}
ATSS_KEYS: Keys = {
    **_head_keys(score_thresh=0.05),
    "BBOX_REG_WEIGHTS": Key(
        (10.0, 10.0, 5.0, 5.0), "Scale of (dx, dy, dw, dh), as in Detectron2", length=4, above=0
    ),
    "BBOX_LOSS_WEIGHT": Key(2.0, "Weight of the GIoU loss", low=0),
    **_FOCAL_LOSS,
}
GFL_KEYS: Keys = {
    **_head_keys(score_thresh=0.05),
    "REG_MAX": Key(
        16,
        "Largest distance from a location to a side of its box, in strides; one bin per stride",
        low=1,
        high=1024,
    ),
    "BBOX_LOSS_WEIGHT": Key(2.0, "Weight of the GIoU loss", low=0),
    "DFL_LOSS_WEIGHT": Key(0.25, "Weight of the distribution focal loss", low=0),
}
TIMM_KEYS: Keys = {
    "NAME": Key(
        "",
        "A timm model, for the backbones build_timm_...; PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT "
        "follow its metadata unless PIXEL_STD is set",
    ),
    "PRETRAINED": Key(False, "Download timm's weights for it"),
    "DROP_PATH_RATE": Key(0.0, "Share of residual branches that are dropped", low=0, high=0.99),
}
BASIC_RESNET_KEYS: Keys = {
    "BLOCKS_PER_STAGE": Key(
        [1, 1, 1, 1], "Basic residual blocks in res2, res3, res4, res5", length=4, low=1, high=256
    ),
    "WIDTH": Key(
        32,
        "Channels of the stem and of res2; they double from stage to stage",
        low=1,
        high=512,
    ),
}
FPN_KEYS: Keys = {
    "RELU_BEFORE_P7": Key(
        True,
        "Whether P7 is the convolution of ReLU(P6), as in Detectron2, or of P6 itself, as in "
        "MMDetection's detectors but FCOS; False names another backbone (use_p7_without_relu)",
    ),
}
# Nodes of their own
NODES: Dict[str, Keys] = {
    "FCOS": FCOS_KEYS,
    "ATSS": ATSS_KEYS,
    "GFL": GFL_KEYS,
    "TIMM": TIMM_KEYS,
    "BASIC_RESNET": BASIC_RESNET_KEYS,
}
_BOX_REG_WEIGHTS = Key((1.0,) * 4, "Scale of (dx, dy, dw, dh)", length=4, above=0)
_OR_ROTATED = replace(_BOX_REG_WEIGHTS, length=(4, 5))
_BOX_REG_LOSS_TYPE = Key("smooth_l1", "The box loss", choices=("smooth_l1", "giou", "diou", "ciou"))
# All keys below MODEL that d2kd adds, and of Detectron2's own those that it would not refuse before
# the first image
MODEL_KEYS: Keys = {
    **NODES,
    "FPN": {
        **FPN_KEYS,
        "OUT_CHANNELS": Key(256, "Channels of every level", low=1, high=16384),
    },
    "PIXEL_MEAN": Key([103.53, 116.28, 123.675], "Mean of each colour channel"),
    "PIXEL_STD": Key([1.0, 1.0, 1.0], "Its standard deviation", above=0),
    "RETINANET": {
        "NUM_CLASSES": _NUM_CLASSES,
        "NUM_CONVS": Key(4, "Blocks in each of the two towers", low=0, high=64),
        "BBOX_REG_WEIGHTS": _BOX_REG_WEIGHTS,
        "BBOX_REG_LOSS_TYPE": _BOX_REG_LOSS_TYPE,
    },
    "RPN": {
        "BATCH_SIZE_PER_IMAGE": Key(256, "Anchors per image that are trained on", low=1),
        "PRE_NMS_TOPK_TRAIN": Key(12000, "Proposals of a level that go into NMS, at most", low=1),
        "PRE_NMS_TOPK_TEST": Key(6000, "The same in evaluation", low=1),
        "POST_NMS_TOPK_TRAIN": Key(2000, "Proposals of an image after NMS, at most", low=1),
        "POST_NMS_TOPK_TEST": Key(1000, "The same in evaluation", low=1),
        "BBOX_REG_WEIGHTS": _OR_ROTATED,
        "BBOX_REG_LOSS_TYPE": _BOX_REG_LOSS_TYPE,
    },
    "ROI_HEADS": {
        "NUM_CLASSES": _NUM_CLASSES,
        "BATCH_SIZE_PER_IMAGE": Key(512, "Regions per image to train on", low=1),
    },
    "ROI_BOX_HEAD": {
        "BBOX_REG_WEIGHTS": replace(_OR_ROTATED, default=(10.0, 10.0, 5.0, 5.0)),
        "BBOX_REG_LOSS_TYPE": _BOX_REG_LOSS_TYPE,
        "POOLER_RESOLUTION": Key(14, "Height and width of a region's features", low=1, high=256),
        "NUM_CONV": Key(0, "Convolutions of the box head", low=0, high=64),
        "CONV_DIM": Key(256, "Their channels", low=1, high=16384),
        "NUM_FC": Key(0, "Linear layers of the box head", low=0, high=64),
        "FC_DIM": Key(1024, "Their outputs", low=1, high=65536),
    },
    "ROI_MASK_HEAD": {
        "POOLER_RESOLUTION": Key(14, "Height and width of a region's features", low=1, high=256),
        "NUM_CONV": Key(0, "Convolutions of the mask head", low=0, high=64),
        "CONV_DIM": Key(256, "Their channels", low=1, high=16384),
    },
}


def add_modeling_config(cfg: CfgNode) -> None:
    """Adds ``MODEL.FCOS``, ``.ATSS``, ``.GFL``, ``.TIMM``, ``.BASIC_RESNET`` and
    ``.FPN.RELU_BEFORE_P7``."""
    cfg.MODEL.FPN.update(config_node(FPN_KEYS))
    for name, keys in NODES.items():
        cfg.MODEL[name] = config_node(keys)

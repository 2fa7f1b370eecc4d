"""Constructor arguments that FCOS, ATSS and GFL read from a config in the same way."""

from typing import Callable, Dict, List

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone

from d2kd.errors import UserError


def detector_arguments(cfg: CfgNode, name: str, head: Callable, **head_arguments) -> Dict:
    """
    Args:
        cfg: the config.
        name: of the detector's node in ``MODEL``, which has the keys of ``MODEL.RETINANET`` that
            FCOS, ATSS and GFL share.
        head: class of the head; takes the arguments of Detectron2's ``FCOSHead``.
        head_arguments: more arguments for it.

    Returns:
        the backbone, the head, and what inference, preprocessing and pictures need.

    Raises:
        UserError: if the backbone lacks a level, or its channels do not suit the norm.
    """
    node = cfg.MODEL[name]
    backbone = build_backbone(cfg)
    shapes = _input_shapes(cfg, name, backbone)
    return {
        "backbone": backbone,
        "head": head(
            input_shape=shapes,
            num_classes=node.NUM_CLASSES,
            conv_dims=[shapes[0].channels] * node.NUM_CONVS,
            norm=node.NORM,
            prior_prob=node.PRIOR_PROB,
            **head_arguments,
        ),
        "head_in_features": node.IN_FEATURES,
        "num_classes": node.NUM_CLASSES,
        "test_score_thresh": node.SCORE_THRESH_TEST,
        "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
        "test_nms_thresh": node.NMS_THRESH_TEST,
        "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "vis_period": cfg.VIS_PERIOD,
        "input_format": cfg.INPUT.FORMAT,
    }


def _input_shapes(cfg: CfgNode, name: str, backbone: Backbone) -> List[ShapeSpec]:
    shapes = backbone.output_shape()
    missing = [level for level in cfg.MODEL[name].IN_FEATURES if level not in shapes]
    if missing:
        raise UserError(
            f"MODEL.{name}.IN_FEATURES names {', '.join(missing)}, but the backbone "
            f"'{cfg.MODEL.BACKBONE.NAME}' has {', '.join(shapes)}: take levels that it has, or a "
            "backbone with P6 and P7 such as build_resnet_fpn_p6p7_backbone"
        )
    if not cfg.MODEL[name].IN_FEATURES:
        raise UserError(f"MODEL.{name}.IN_FEATURES is empty: name FPN levels, finest first")
    shapes = [shapes[level] for level in cfg.MODEL[name].IN_FEATURES]
    if cfg.MODEL[name].NORM == "GN" and shapes[0].channels % 32:
        raise UserError(
            f"MODEL.{name}.NORM is 'GN', which makes 32 groups, but the levels have "
            f"{shapes[0].channels} channels: give MODEL.FPN.OUT_CHANNELS a multiple of 32, or "
            "take another norm"
        )
    return shapes

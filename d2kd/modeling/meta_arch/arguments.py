"""Constructor arguments that FCOS, ATSS and GFL read from a config in the same way."""

from typing import Callable, Dict

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone


def detector_arguments(cfg: CfgNode, node: CfgNode, head: Callable, **head_arguments) -> Dict:
    """
    Args:
        cfg: the config.
        node: the detector's node in it, with the keys of ``MODEL.RETINANET`` that they share.
        head: class of the head; takes the arguments of Detectron2's ``FCOSHead``.
        head_arguments: more arguments for it.

    Returns:
        the backbone, the head, and what inference, preprocessing and pictures need.
    """
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    shapes = [shapes[name] for name in node.IN_FEATURES]
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

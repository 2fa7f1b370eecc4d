"""Backbones that Detectron2 lacks."""

# Importing registers them in Detectron2's BACKBONE_REGISTRY.
from .basic_resnet import build_basic_resnet_backbone
from .fpn import (
    build_basic_resnet_fpn_backbone,
    build_basic_resnet_fpn_p6p7_backbone,
    build_basic_resnet_fpn_p6p7_no_relu_backbone,
    build_resnet_fpn_p6p7_backbone,
    build_resnet_fpn_p6p7_no_relu_backbone,
    build_retinanet_resnet_fpn_no_relu_backbone,
    check_p7,
    use_p7_without_relu,
)
from .timm import (
    build_timm_backbone,
    build_timm_fpn_backbone,
    build_timm_fpn_p6p7_backbone,
    build_timm_fpn_p6p7_no_relu_backbone,
    build_timm_retinanet_fpn_backbone,
    build_timm_retinanet_fpn_no_relu_backbone,
)

__all__ = [
    "build_basic_resnet_backbone",
    "build_basic_resnet_fpn_backbone",
    "build_basic_resnet_fpn_p6p7_backbone",
    "build_basic_resnet_fpn_p6p7_no_relu_backbone",
    "build_resnet_fpn_p6p7_backbone",
    "build_resnet_fpn_p6p7_no_relu_backbone",
    "build_retinanet_resnet_fpn_no_relu_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_timm_fpn_p6p7_backbone",
    "build_timm_fpn_p6p7_no_relu_backbone",
    "build_timm_retinanet_fpn_backbone",
    "build_timm_retinanet_fpn_no_relu_backbone",
    "check_p7",
    "use_p7_without_relu",
]

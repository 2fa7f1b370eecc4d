"""Backbones that Detectron2 lacks: importing this registers them in its BACKBONE_REGISTRY."""

from . import basic_resnet, fpn, timm
from .fpn import check_p7, use_p7_without_relu

__all__ = ["basic_resnet", "check_p7", "fpn", "timm", "use_p7_without_relu"]

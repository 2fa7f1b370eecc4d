"""FPNs on small ResNets, and FPNs whose coarsest levels come from P5."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import nn

from .basic_resnet import build_basic_resnet_backbone


def build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    """An FPN with the settings of ``MODEL.FPN`` on a backbone."""
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def p6p7_from_p5(cfg: CfgNode) -> LastLevelP6P7:
    """The coarsest levels of dense detectors, computed from the P5 output."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return LastLevelP6P7(channels, channels, in_feature="p5")


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_p6p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A Detectron2 ResNet with an FPN; P6 and P7 are convolutions of the P5 output.

    FCOS, ATSS and GFL use it. Detectron2's ``build_retinanet_resnet_fpn_backbone`` computes P6
    from res5 instead.
    """
    return build_fpn(cfg, build_resnet_backbone(cfg, input_shape), p6p7_from_p5(cfg))


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_p6p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A small ResNet with an FPN for dense detectors; P6 and P7 are convolutions of P5."""
    return build_fpn(cfg, build_basic_resnet_backbone(cfg, input_shape), p6p7_from_p5(cfg))


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A small ResNet with an FPN for two-stage detectors; P6 is P5 with every second pixel."""
    return build_fpn(cfg, build_basic_resnet_backbone(cfg, input_shape), LastLevelMaxPool())

"""FPNs on small ResNets, and FPNs whose coarsest levels are not computed as in Detectron2.

Detectron2 computes P7 as the convolution of ReLU(P6). MMDetection, with whose detectors the tables
of most papers are made, does so in FCOS alone: elsewhere P7 is the convolution of P6 itself.
``MODEL.FPN.RELU_BEFORE_P7`` chooses.
"""

from typing import List, Optional

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import Tensor, nn

from d2kd.errors import UserError

from .basic_resnet import build_basic_resnet_backbone

# The same backbone without the ReLU before P7. Its name alone says so: what a file of the student
# holds is then a name that stock Detectron2 does not know, instead of a key that it would ignore.
WITHOUT_RELU = {
    "build_retinanet_resnet_fpn_backbone": "build_retinanet_resnet_fpn_no_relu_backbone",
    "build_resnet_fpn_p6p7_backbone": "build_resnet_fpn_p6p7_no_relu_backbone",
    "build_basic_resnet_fpn_p6p7_backbone": "build_basic_resnet_fpn_p6p7_no_relu_backbone",
    "build_timm_fpn_p6p7_backbone": "build_timm_fpn_p6p7_no_relu_backbone",
    "build_timm_retinanet_fpn_backbone": "build_timm_retinanet_fpn_no_relu_backbone",
}


def use_p7_without_relu(cfg: CfgNode) -> None:
    """With ``MODEL.FPN.RELU_BEFORE_P7`` False, names the backbone that computes P7 so. A backbone
    with such a name turns the key to False.

    Args:
        cfg: changed in place, unless both agree.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name in WITHOUT_RELU.values() and cfg.MODEL.FPN.RELU_BEFORE_P7:
        cfg.MODEL.FPN.RELU_BEFORE_P7 = False
    elif name in WITHOUT_RELU and not cfg.MODEL.FPN.RELU_BEFORE_P7:
        cfg.MODEL.BACKBONE.NAME = WITHOUT_RELU[name]


def check_p7(cfg: CfgNode, backbone: Optional[nn.Module]) -> None:
    """
    Args:
        cfg: what the backbone was built from.
        backbone: of a detector; one without P7 is as good as any.

    Raises:
        UserError: if ``MODEL.FPN.RELU_BEFORE_P7`` is False and the backbone did not heed it.
    """
    if cfg.MODEL.FPN.get("RELU_BEFORE_P7", True) or backbone is None:
        return
    if "p7" not in backbone.output_shape():
        return
    if not isinstance(getattr(backbone, "top_block", None), LastLevelP6P7WithoutReLU):
        raise UserError(
            f"MODEL.FPN.RELU_BEFORE_P7 is False, but MODEL.BACKBONE.NAME is "
            f"'{cfg.MODEL.BACKBONE.NAME}', which does not read it: set it to True, or take one of "
            f"{', '.join(WITHOUT_RELU)}"
        )


class LastLevelP6P7WithoutReLU(LastLevelP6P7):
    """P6 and P7 as two convolutions in a row, nothing between them. The weights' names are those of
    Detectron2's ``LastLevelP6P7``."""

    def forward(self, x: Tensor) -> List[Tensor]:
        """(N, C, h, w) -> P6 (N, C', h / 2, w / 2), P7 (N, C', h / 4, w / 4)."""
        p6 = self.p6(x)
        return [p6, self.p7(p6)]


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


def build_fpn_p6p7(
    cfg: CfgNode, bottom_up: Backbone, in_feature: str = "p5", relu: bool = True
) -> FPN:
    """An FPN for dense detectors on a backbone.

    Args:
        bottom_up: the backbone.
        in_feature: what P6 is computed from, "p5" or a stage of the backbone.
        relu: whether a ReLU stands before P7, unless ``MODEL.FPN.RELU_BEFORE_P7`` is False.
    """
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    shapes = bottom_up.output_shape()
    in_channels = shapes[in_feature].channels if in_feature in shapes else channels
    relu = relu and cfg.MODEL.FPN.get("RELU_BEFORE_P7", True)
    block = LastLevelP6P7 if relu else LastLevelP6P7WithoutReLU
    return build_fpn(cfg, bottom_up, block(in_channels, channels, in_feature))


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_p6p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A Detectron2 ResNet with an FPN; P6 and P7 are convolutions of the P5 output.

    FCOS, ATSS and GFL use it. Detectron2's ``build_retinanet_resnet_fpn_backbone`` computes P6
    from res5 instead.
    """
    return build_fpn_p6p7(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_p6p7_no_relu_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_resnet_fpn_p6p7_backbone`` without the ReLU before P7."""
    return build_fpn_p6p7(cfg, build_resnet_backbone(cfg, input_shape), relu=False)


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_no_relu_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ``build_retinanet_resnet_fpn_backbone``, where P6 is a convolution of res5,
    without the ReLU before P7."""
    return build_fpn_p6p7(cfg, build_resnet_backbone(cfg, input_shape), "res5", relu=False)


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_p6p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A small ResNet with an FPN for dense detectors; P6 and P7 are convolutions of P5."""
    return build_fpn_p6p7(cfg, build_basic_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_p6p7_no_relu_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_basic_resnet_fpn_p6p7_backbone`` without the ReLU before P7."""
    return build_fpn_p6p7(cfg, build_basic_resnet_backbone(cfg, input_shape), relu=False)


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A small ResNet with an FPN for two-stage detectors; P6 is P5 with every second pixel."""
    return build_fpn(cfg, build_basic_resnet_backbone(cfg, input_shape), LastLevelMaxPool())

"""Any backbone of timm that gives feature maps, with an FPN."""

from typing import Dict

import timm
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor, nn

from d2kd.errors import UserError, nearest

from .fpn import build_fpn, build_fpn_p6p7

STAGES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}  # by stride, named as in a ResNet


class TimmBackbone(Backbone):
    """The feature maps of a timm model at strides 4 to 32, as "res2" to "res5"."""

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        freeze_norm: bool = False,
        drop_path_rate: float = 0.0,
    ):
        """
        Args:
            name: of a timm model.
            pretrained: download its weights.
            freeze_norm: replace BatchNorm by Detectron2's FrozenBatchNorm2d.
            drop_path_rate: share of residual branches that are dropped in training.

        Raises:
            UserError: if timm has no such model, or its weights cannot be had.
        """
        super().__init__()
        body = _create(name, pretrained, drop_path_rate)
        self.body = FrozenBatchNorm2d.convert_frozen_batchnorm(body) if freeze_norm else body
        self._channels_last = str(getattr(body, "output_fmt", "")).endswith("NHWC")
        info = body.feature_info
        self._shapes = {
            STAGES[stride]: ShapeSpec(channels=channels, stride=stride)
            for stride, channels in zip(info.reduction(), info.channels())
            if stride in STAGES
        }
        self._names = [STAGES.get(stride) for stride in info.reduction()]

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """(N, 3, H, W) -> (N, C, H / stride, W / stride) by stage."""
        outputs = self.body(x)
        if self._channels_last:
            outputs = [y.permute(0, 3, 1, 2) for y in outputs]
        return {name: y for name, y in zip(self._names, outputs) if name is not None}

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return self._shapes


def _create(name: str, pretrained: bool, drop_path_rate: float) -> nn.Module:
    if not timm.is_model(name):
        raise UserError(f"MODEL.TIMM.NAME is '{name}': {nearest(name, timm.list_models())}")
    options = {"features_only": True, "pretrained": pretrained}
    if drop_path_rate:  # not every model knows it
        options["drop_path_rate"] = drop_path_rate
    try:
        try:
            # What models with windows of fixed size need to take images of any size
            return timm.create_model(name, strict_img_size=False, **options)
        except TypeError:
            return timm.create_model(name, **options)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"MODEL.TIMM.PRETRAINED is True, but the weights of '{name}' cannot be had "
            f"({type(error).__name__}): connect to the network, or set it to False and give "
            "MODEL.WEIGHTS"
        ) from error


def use_timm_pixels(cfg: CfgNode) -> None:
    """Takes mean, std and channel order from timm's metadata if the config's backbone is timm's,
    unless the config has its own."""
    if not cfg.MODEL.BACKBONE.NAME.startswith("build_timm_"):
        return
    metadata = timm.get_pretrained_cfg(cfg.MODEL.TIMM.NAME)
    if metadata is None or cfg.MODEL.PIXEL_STD != [1.0, 1.0, 1.0]:
        return
    cfg.MODEL.PIXEL_MEAN = [255 * x for x in metadata.mean]
    cfg.MODEL.PIXEL_STD = [255 * x for x in metadata.std]
    cfg.INPUT.FORMAT = "RGB"


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The timm model ``MODEL.TIMM.NAME``. With ``MODEL.RESNETS.NORM`` "FrozenBN" its BatchNorm is
    frozen; ``MODEL.BACKBONE.FREEZE_AT`` is not read."""
    node = cfg.MODEL.TIMM
    return TimmBackbone(
        node.NAME,
        node.PRETRAINED,
        cfg.MODEL.RESNETS.NORM == "FrozenBN",
        node.DROP_PATH_RATE,
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A timm model with an FPN for two-stage detectors; P6 is P5 with every second pixel."""
    return build_fpn(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_timm_fpn_p6p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A timm model with an FPN for dense detectors; P6 and P7 are convolutions of P5."""
    return build_fpn_p6p7(cfg, build_timm_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_timm_fpn_p6p7_no_relu_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_timm_fpn_p6p7_backbone`` without the ReLU before P7."""
    return build_fpn_p6p7(cfg, build_timm_backbone(cfg, input_shape), relu=False)


@BACKBONE_REGISTRY.register()
def build_timm_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A timm model with an FPN for dense detectors; P6 is a convolution of res5, as in Detectron2's
    RetinaNet."""
    return build_fpn_p6p7(cfg, build_timm_backbone(cfg, input_shape), "res5")


@BACKBONE_REGISTRY.register()
def build_timm_retinanet_fpn_no_relu_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_timm_retinanet_fpn_backbone`` without the ReLU before P7."""
    return build_fpn_p6p7(cfg, build_timm_backbone(cfg, input_shape), "res5", relu=False)

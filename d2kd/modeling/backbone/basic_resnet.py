"""A small residual network of basic blocks, any number per stage and any width."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet


@BACKBONE_REGISTRY.register()
def build_basic_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet of ``MODEL.BASIC_RESNET.BLOCKS_PER_STAGE`` basic blocks in res2 ... res5.

    The stem and res2 have ``MODEL.BASIC_RESNET.WIDTH`` channels, every further stage twice those
    of the one before. ``MODEL.RESNETS.NORM``, ``MODEL.RESNETS.OUT_FEATURES`` and
    ``MODEL.BACKBONE.FREEZE_AT`` mean what they mean for Detectron2's own ResNets.
    """
    blocks_per_stage = cfg.MODEL.BASIC_RESNET.BLOCKS_PER_STAGE
    norm = cfg.MODEL.RESNETS.NORM
    channels = cfg.MODEL.BASIC_RESNET.WIDTH
    stem = BasicStem(in_channels=input_shape.channels, out_channels=channels, norm=norm)
    stages = []
    for i, num_blocks in enumerate(blocks_per_stage):
        out_channels = cfg.MODEL.BASIC_RESNET.WIDTH * 2**i
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                stride_per_block=[1 if i == 0 else 2] + [1] * (num_blocks - 1),
                in_channels=channels,
                out_channels=out_channels,
                norm=norm,
            )
        )
        channels = out_channels
    return ResNet(
        stem,
        stages,
        out_features=cfg.MODEL.RESNETS.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )

# The student of fcos_tiny.yaml, alone, as a Python config (LazyConfig): FCOS, stem of 8 channels.
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

width, channels, size = 8, 64, 128

model = model_zoo.get_config("common/models/fcos.py").model
model.backbone = L(FPN)(
    bottom_up=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=width, norm="BN"),
        stages=[
            L(ResNet.make_stage)(
                block_class=BasicBlock,
                num_blocks=1,
                stride_per_block=[1 if i == 0 else 2],
                in_channels=width * 2 ** max(i - 1, 0),
                out_channels=width * 2**i,
                norm="BN",
            )
            for i in range(4)
        ],
        out_features=["res3", "res4", "res5"],
    ),
    in_features="${.bottom_up.out_features}",
    out_channels=channels,
    norm="BN",
    top_block=L(LastLevelP6P7)(in_channels=channels, out_channels=channels, in_feature="p5"),
)
model.num_classes = 6
model.head.input_shape = [ShapeSpec(channels=channels)] * 5
model.head.conv_dims = [channels] * 2
model.test_score_thresh = 0.05
model.pixel_mean, model.pixel_std = [127.5] * 3, [58.0] * 3

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = "shapes_tiny_train"
dataloader.train.mapper.augmentations[0] = L(ResizeShortestEdge)(
    short_edge_length=[size], max_size=size, sample_style="choice"
)
dataloader.train.mapper.use_instance_mask = False
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 0
dataloader.test.dataset.names = "shapes_tiny_val"
dataloader.test.mapper.augmentations[0].update(short_edge_length=size, max_size=size)
dataloader.test.num_workers = 0

train = model_zoo.get_config("common/train.py").train
train.update(max_iter=750, eval_period=0, device="cpu", seed=1)
train.checkpointer.period = 750

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1, end_value=0),
    warmup_length=100 / train.max_iter,
    warmup_factor=0.04,
)
optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=0.002,
    weight_decay=0.01,
)

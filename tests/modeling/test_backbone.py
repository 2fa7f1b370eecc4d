"""The small backbones and the FPNs whose coarsest levels come from P5."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from toys import config

from d2kd.errors import UserError

DENSE = ["p3", "p4", "p5", "p6", "p7"]
TWO_STAGE = ["p2", "p3", "p4", "p5", "p6"]


def backbone(name, opts=()):
    detector = "fcos" if "p6p7" in name else "faster_rcnn"
    yaml = f"shapes/baselines/{detector}_tiny.yaml"
    return build_backbone(config(yaml, ["MODEL.BACKBONE.NAME", name, *opts]))


@pytest.mark.parametrize(
    "name, levels",
    [
        ("build_basic_resnet_fpn_backbone", TWO_STAGE),
        ("build_basic_resnet_fpn_p6p7_backbone", DENSE),
        ("build_resnet_fpn_p6p7_backbone", DENSE),
    ],
)
def test_levels_have_the_strides_they_claim(name, levels):
    model = backbone(name)
    shapes = model.output_shape()
    outputs = model(torch.rand(2, 3, 128, 128))
    assert list(outputs) == levels == list(shapes)
    for level, x in outputs.items():
        assert shapes[level].stride == 2 ** int(level[1])
        size = 128 // shapes[level].stride
        assert x.shape == (2, shapes[level].channels, size, size)


@pytest.mark.parametrize(
    "name", ["build_basic_resnet_fpn_p6p7_backbone", "build_resnet_fpn_p6p7_backbone"]
)
def test_p6_comes_from_p5(name):
    outputs = (model := backbone(name).eval())(torch.rand(1, 3, 128, 128))
    p6 = model.top_block.p6(outputs["p5"])
    assert torch.equal(p6, outputs["p6"])
    assert torch.equal(model.top_block.p7(p6.relu()), outputs["p7"])


def test_width_and_blocks():
    opts = ["MODEL.BASIC_RESNET.WIDTH", 12, "MODEL.BASIC_RESNET.BLOCKS_PER_STAGE", [1, 2, 1, 3]]
    bottom_up = backbone("build_basic_resnet_fpn_backbone", opts).bottom_up
    stages = [bottom_up.res2, bottom_up.res3, bottom_up.res4, bottom_up.res5]
    assert [len(stage) for stage in stages] == [1, 2, 1, 3]
    assert bottom_up.stem.out_channels == 12
    assert [stage[-1].out_channels for stage in stages] == [12, 24, 48, 96]


def test_freeze_at():
    bottom_up = backbone(
        "build_basic_resnet_fpn_backbone", ["MODEL.BACKBONE.FREEZE_AT", 2]
    ).bottom_up
    frozen = {n.split(".")[0] for n, p in bottom_up.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}
    assert isinstance(bottom_up.stem.conv1.norm, FrozenBatchNorm2d)


@pytest.mark.parametrize("blocks", [[1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1, 1]])
def test_wrong_number_of_stages_is_explained(blocks):
    with pytest.raises(UserError, match=r"BLOCKS_PER_STAGE is \[1, 1.*: give"):
        backbone("build_basic_resnet_fpn_backbone", ["MODEL.BASIC_RESNET.BLOCKS_PER_STAGE", blocks])

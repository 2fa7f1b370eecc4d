"""P7 with and without the ReLU before it."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from toys import STUDENTS, batch, config, detector, step

from d2kd.errors import UserError
from d2kd.modeling import add_modeling_config
from d2kd.modeling.backbone import check_p7, use_p7_without_relu
from d2kd.modeling.backbone.fpn import WITHOUT_RELU

KEY = "MODEL.FPN.RELU_BEFORE_P7"
RESNET = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
RESNET += ["MODEL.TIMM.NAME", "mobilenetv2_050"]
RESNET += ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]


def chosen(name, relu=True, opts=()):
    cfg = config(STUDENTS["GFL"], ["MODEL.BACKBONE.NAME", name, KEY, relu, *RESNET, *opts])
    use_p7_without_relu(cfg)
    return cfg


@pytest.mark.parametrize("name", WITHOUT_RELU)
def test_the_same_backbone_without_the_relu(name):
    torch.manual_seed(0)
    plain = build_backbone(chosen(name)).eval()
    torch.manual_seed(0)
    without = build_backbone(chosen(name, relu=False)).eval()
    weights = zip(plain.state_dict().items(), without.state_dict().items())
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in weights)
    image = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        a, b = plain(image), without(image)
        p6 = b["p6"]
        assert (p6 < 0).any()
        assert all(torch.equal(a[level], b[level]) for level in ("p3", "p4", "p5", "p6"))
        assert torch.equal(a["p7"], plain.top_block.p7(p6.relu()))
        assert torch.equal(b["p7"], plain.top_block.p7(p6)) and not torch.equal(a["p7"], b["p7"])


def test_p6_of_a_retinanet_comes_from_res5():
    backbone = build_backbone(chosen("build_retinanet_resnet_fpn_backbone", relu=False)).eval()
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        p6 = backbone.top_block.p6(backbone.bottom_up(image)["res5"])
        assert torch.equal(backbone(image)["p6"], p6)


@pytest.mark.parametrize("name, other", WITHOUT_RELU.items())
def test_the_key_names_the_backbone_and_the_name_sets_the_key(name, other):
    cfg = chosen(name, relu=False)
    assert other == cfg.MODEL.BACKBONE.NAME
    named = chosen(other)
    assert named.MODEL.FPN.RELU_BEFORE_P7 is False and other == named.MODEL.BACKBONE.NAME
    assert name == chosen(name).MODEL.BACKBONE.NAME


def test_ours_read_the_key_under_either_name():
    cfg = config(STUDENTS["GFL"], [KEY, False])
    cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_fpn_p6p7_backbone"
    check_p7(cfg, build_backbone(cfg))


def test_configs_without_the_key_have_the_relu():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_p6p7_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    assert type(build_backbone(cfg).top_block) is LastLevelP6P7


def test_a_backbone_that_ignores_the_key_is_refused():
    cfg = get_cfg()
    add_modeling_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    backbone = build_backbone(cfg)
    check_p7(cfg, backbone)
    cfg.MODEL.FPN.RELU_BEFORE_P7 = False
    with pytest.raises(UserError, match=f"{KEY} is False.*'build_retinanet_resnet_fpn_backbone'"):
        check_p7(cfg, backbone)


def test_a_backbone_without_p7_has_no_relu_to_leave_out():
    cfg = config(STUDENTS["FasterRCNN"], [KEY, False])
    use_p7_without_relu(cfg)
    assert cfg.MODEL.BACKBONE.NAME == "build_basic_resnet_fpn_backbone"
    check_p7(cfg, build_backbone(cfg))


def test_trains():
    name = "build_basic_resnet_fpn_p6p7_no_relu_backbone"
    model = detector(STUDENTS["GFL"], ["MODEL.BACKBONE.NAME", name])
    losses = step(model, batch())
    sum(losses.values()).backward()
    assert model.backbone.top_block.p7.weight.grad.isfinite().all()

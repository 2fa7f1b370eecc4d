"""Backbones of timm: feature maps, metadata, training, and what happens without a network."""

import pytest
import timm
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from toys import STUDENTS, batch, config, detector, distill_config, step

from d2kd.checkpoint.student_config import student_config
from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.modeling.backbone.timm import TimmBackbone

MOBILENET = ["MODEL.TIMM.NAME", "mobilenetv2_050"]
DENSE = ["MODEL.BACKBONE.NAME", "build_timm_fpn_p6p7_backbone", *MOBILENET]
TWO_STAGE = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", *MOBILENET]
UNSET = ["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]  # the embedded benchmark sets its own


@pytest.mark.parametrize(
    "name, channels",
    [
        ("mobilenetv2_100", [24, 32, 96, 320]),
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768]),
        ("resnet18", [64, 128, 256, 512]),
    ],
)
def test_stages_by_stride(name, channels):
    backbone = TimmBackbone(name).eval()
    with torch.no_grad():
        outputs = backbone(torch.rand(1, 3, 96, 160))
    assert list(outputs) == ["res2", "res3", "res4", "res5"]
    for i, (stage, shape) in enumerate(backbone.output_shape().items()):
        assert (shape.stride, shape.channels) == (4 * 2**i, channels[i])
        assert outputs[stage].shape == (1, channels[i], 96 // shape.stride, 160 // shape.stride)


def test_frozen_norm():
    kinds = {type(m) for m in TimmBackbone("mobilenetv2_050", freeze_norm=True).modules()}
    assert FrozenBatchNorm2d in kinds and not any(issubclass(k, nn.BatchNorm2d) for k in kinds)


@pytest.mark.parametrize("student, opts", [("FCOS", DENSE), ("FasterRCNN", TWO_STAGE)])
def test_trains_as_a_student(tmp_path, student, opts):
    features = ["res3", "res4", "res5"] if student == "FCOS" else ["res2", "res3", "res4", "res5"]
    opts = [*opts, "MODEL.FPN.IN_FEATURES", features]
    losses = step(build_model(distill_config(tmp_path, student, opts)), batch())
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_mean_std_and_channel_order_come_from_timm():
    cfg = config(STUDENTS["FCOS"], [*DENSE, *UNSET])
    assert cfg.INPUT.FORMAT == "RGB"
    assert [255 * x for x in timm.data.IMAGENET_DEFAULT_MEAN] == cfg.MODEL.PIXEL_MEAN
    assert [255 * x for x in timm.data.IMAGENET_DEFAULT_STD] == cfg.MODEL.PIXEL_STD
    own = config(STUDENTS["FCOS"], DENSE)
    assert own.INPUT.FORMAT == "BGR" and own.MODEL.PIXEL_STD == [58.0, 58.0, 58.0]


def test_teacher_of_timm_gets_its_own_pixels(tmp_path):
    opts = ["DISTILL.FRS.CLS.WEIGHT", 0.0]
    teacher_opts = [*DENSE, *UNSET, "MODEL.TIMM.PRETRAINED", True]  # its checkpoint fills it
    torch.manual_seed(7)
    plain = detector(STUDENTS["FCOS"], [*DENSE, *UNSET])
    cfg = distill_config(tmp_path, "FCOS", opts, teacher_opts=[*DENSE, *UNSET])
    cfg.DISTILL.TEACHER.OPTS = teacher_opts
    model = build_model(cfg)
    assert model.teacher.input_format == "RGB"
    assert torch.equal(model.teacher.detector.pixel_std, plain.pixel_std)
    assert torch.isfinite(step(model, batch())["loss_frs_feature"])


def test_student_yaml_does_not_download():
    cfg = config(STUDENTS["FCOS"], [*DENSE, "MODEL.TIMM.PRETRAINED", True])
    student = student_config(cfg)
    assert student.MODEL.TIMM.NAME == "mobilenetv2_050" and "PRETRAINED" not in student.MODEL.TIMM


def test_unknown_name_names_the_nearest():
    with pytest.raises(
        UserError, match="MODEL.TIMM.NAME is 'mobilnetv2_100': did you mean 'mobile"
    ):
        detector(STUDENTS["FCOS"], [*DENSE, "MODEL.TIMM.NAME", "mobilnetv2_100"])


def test_weights_that_cannot_be_had(monkeypatch):
    def offline(*args, **kwargs):
        raise FileNotFoundError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(UserError, match="MODEL.TIMM.PRETRAINED is True.*set it to False"):
        TimmBackbone("resnet18", pretrained=True)


def test_dropped_paths():
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", drop_path_rate=0.5).train()
    rates = [m.drop_prob for m in backbone.modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.5)


def test_p6_of_res5():
    name = "build_timm_retinanet_fpn_backbone"
    opts = [
        "MODEL.BACKBONE.NAME",
        name,
        *MOBILENET,
        "MODEL.FPN.IN_FEATURES",
        ["res3", "res4", "res5"],
    ]
    backbone = detector(STUDENTS["RetinaNet"], opts).backbone
    assert backbone.top_block.in_feature == "res5"
    assert backbone.top_block.p6.in_channels == backbone.bottom_up.output_shape()["res5"].channels

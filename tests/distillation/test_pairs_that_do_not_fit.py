"""Pairs on which a loss would mean nothing are refused with the key, or handled."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Keypoints
from torch import nn
from toys import STUDENTS, batch, config, detector, distill_config, step

from d2kd.distillation import build_detector, build_model
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.views import CannotRead, Features, Stage, build_family, paired_stages

SIZES = ["MODEL.ANCHOR_GENERATOR.SIZES", [[x, x * 1.3, x * 1.6] for x in (16, 32, 64, 128, 256)]]
OFFSET = ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5]
RATIOS = ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.4, 1.0, 2.5]]]


@pytest.mark.parametrize("method", ["FRS", "CrossKD", "Mimicking"])
@pytest.mark.parametrize("opts", [SIZES, RATIOS, OFFSET], ids=["sizes", "ratios", "offset"])
def test_retinanets_with_other_anchors(tmp_path, method, opts):
    depth = ["DISTILL.CROSSKD.DEPTH", 1]
    cfg = distill_config(tmp_path, "RetinaNet", depth, teacher_opts=opts, methods=[method])
    with pytest.raises(UserError, match=r"DISTILL\.\w+.*MODEL\.ANCHOR_GENERATOR"):
        build_model(cfg)


def test_features_alone_do_not_care_for_anchors(tmp_path):
    off = ["DISTILL.FRS.CLS.WEIGHT", 0.0]
    build_model(distill_config(tmp_path, "RetinaNet", off, teacher_opts=SIZES))


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("method, term", [("DeFeat", "HEAD_OBJECT"), ("GDetKD", "CLS")])
def test_box_heads_that_score_each_class_by_itself(method, term, side):
    nets = {name: detector(STUDENTS["FasterRCNN"]) for name in ("student", "teacher")}
    for name in nets if side == "both" else [side]:
        nets[name].roi_heads.box_predictor.use_sigmoid_ce = True
    cls = DISTILLER_REGISTRY.get(method)
    node = cls.default_config()
    node[term].WEIGHT = 1.0
    with pytest.raises(UserError, match=rf"{term}.WEIGHT compares distributions .*USE_SIGMOID_CE"):
        cls.check_pair(node, build_family(nets["student"]), build_family(nets["teacher"]))


class Trunk(Backbone):
    """A plain backbone of one map, as a ViT is."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, stride=16)

    def forward(self, x):
        return {"last_feat": self.patches(x)}

    def output_shape(self):
        return {"last_feat": ShapeSpec(channels=8, stride=16)}


def test_stages_of_a_vitdet_are_those_of_its_trunk():
    net = detector(STUDENTS["RetinaNet"])
    trunk = Trunk()
    del net.backbone.bottom_up
    net.backbone.net = trunk
    family = build_family(net)
    assert family.stage_module is trunk
    assert [(s.name, s.stride) for s in family.stages] == [("last_feat", 16)]
    assert family.observe(Features()) == []
    with pytest.raises(CannotRead, match="has last_feat"):
        family.observe(Stage("p3"))


C4 = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18]
C4 += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RPN.IN_FEATURES", ["res5"]]
C4 += ["MODEL.ROI_HEADS.IN_FEATURES", ["res5"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]]]
DC5 = [*C4, "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]


def without_fpn(seed=0):
    net = detector(STUDENTS["FasterRCNN"], DC5, seed)
    net.backbone._out_feature_strides["res5"] = 16  # as with RES5_DILATION 2
    return net


def test_a_backbone_without_an_fpn_has_stages_and_no_levels():
    family = build_family(without_fpn())
    with pytest.raises(CannotRead, match="no FPN: its head reads res5 of the backbone"):
        family.observe(Features())
    assert family.observe(Stage("res4"))


def test_stages_of_one_stride_are_paired_by_name_or_refused():
    dilated, plain = build_family(without_fpn()), build_family(detector(STUDENTS["FasterRCNN"]))
    pairs = paired_stages(dilated, dilated, ["res4", "res5"], "X")
    assert [(a.name, b.name) for a, b in pairs] == [("res4", "res4"), ("res5", "res5")]
    (pair,) = paired_stages(plain, dilated, ["res4"], "X")
    assert pair[1].name == "res4"
    dilated.stages[1] = dilated.stages[1]._replace(name="c4")
    with pytest.raises(UserError, match="X names 'res4' of stride 16, .* c4, res5: which of them"):
        paired_stages(plain, dilated, ["res4"], "X")


@pytest.mark.parametrize("name", ["RetinaNet", "FasterRCNN"])
def test_rotated_boxes_are_refused(name):
    from detectron2.modeling.box_regression import Box2BoxTransformRotated

    net = detector(STUDENTS[name])
    part = net if name == "RetinaNet" else net.proposal_generator
    part.box2box_transform = Box2BoxTransformRotated(weights=(1, 1, 1, 1, 1))
    with pytest.raises(UserError, match="rotated boxes .* cannot be distilled"):
        build_family(net)


PANOPTIC = ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", True]
PANOPTIC += ["MODEL.SEM_SEG_HEAD.NORM", "", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8]
PANOPTIC += ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
KEYPOINTS = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)]
KEYPOINTS += ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3]


def test_heads_that_learn_from_ground_truth_alone_are_named(tmp_path, caplog):
    net = build_detector(config(STUDENTS["FasterRCNN"], PANOPTIC))
    assert build_family(net).not_distilled == ["mask head", "semantic head"]
    with caplog.at_level("INFO"):
        build_model(distill_config(tmp_path, "FasterRCNN", KEYPOINTS))
    assert "Learn from ground truth alone: keypoint head" in caplog.text


@pytest.mark.parametrize("method", ["FRS", "DeFeat", "PKD"])
def test_a_keypoint_student_trains(tmp_path, method):
    model = build_model(distill_config(tmp_path, "FasterRCNN", KEYPOINTS, methods=[method]))
    inputs = batch()
    for x in inputs:
        centers = x["instances"].gt_boxes.get_centers()
        points = torch.cat([centers, torch.full((len(centers), 1), 2.0)], dim=1)
        x["instances"].gt_keypoints = Keypoints(points[:, None].repeat(1, 3, 1))
    losses = step(model, inputs)
    assert {"loss_keypoint", "loss_box_reg"} < set(losses)
    assert any(name.startswith(f"loss_{method.lower()}") for name in losses)
    assert all(torch.isfinite(x) for x in losses.values())

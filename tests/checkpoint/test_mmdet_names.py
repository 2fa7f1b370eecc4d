"""MMDetection's names and the values that change, without MMDetection's files: names and shapes of
its full-size models (golden/mmdet_keys.json.gz, by config), and small state dicts by hand."""

import gzip
import json
import os

import pytest
import torch

from d2kd.checkpoint.files import Unreadable
from d2kd.checkpoint.mmdet import convert, is_mmdet
from d2kd.config import read_config
from d2kd.distillation import build_detector

with gzip.open(os.path.join(os.path.dirname(__file__), "golden", "mmdet_keys.json.gz")) as f:
    KEYS = json.load(f)
SWIN = "retinanet_swin-t-p4-w7_fpn_1x_coco"
OURS = {
    "retinanet_r18_fpn_1x_coco": "baselines/retinanet_R_18_FPN_1x.yaml",
    "retinanet_r50_fpn_1x_coco": "baselines/retinanet_R_50_FPN_1x.yaml",
    "retinanet_r101_fpn_2x_coco": "baselines/retinanet_R_101_FPN_2x.yaml",
    "gfl_r50_fpn_1x_coco": "baselines/gfl_R_50_FPN_1x.yaml",
    "gfl_r101_fpn_ms-2x_coco": "baselines/gfl_R_101_FPN_ms_2x.yaml",
    "atss_r101_fpn_1x_coco": "baselines/atss_R_101_FPN_1x.yaml",
    "fcos_r101-caffe_fpn_gn-head_ms-640-800-2x_coco": "baselines/fcos_R_101_FPN_ms_2x.yaml",
    "faster-rcnn_r101_fpn_2x_coco": "baselines/faster_rcnn_R_101_FPN_2x.yaml",
}
FASTER = "faster-rcnn_r101_fpn_2x_coco"


def full_size(name):
    """A state dict of MMDetection without values."""
    return {k: torch.empty(shape, device="meta") for k, shape in KEYS[name].items()}


def shapes(state):
    return {name: tuple(x.shape) for name, x in state.items()}


def detector_shapes(name, opts=()):
    cfg = read_config(name, ["MODEL.DEVICE", "meta", *opts])
    with torch.device("meta"):
        return shapes(build_detector(cfg).state_dict())


def test_every_model_is_tried():
    assert {SWIN, *OURS} == set(KEYS)


@pytest.mark.parametrize("name", OURS)
def test_full_size_models_fit_and_every_key_is_used_or_left_out(name):
    converted = convert(full_size(name))
    assert shapes(converted.tensors) == detector_shapes(OURS[name])
    used = {s for source in converted.sources.values() for s in (source or "").split(", ")} - {""}
    assert used | set(converted.left_out) == set(KEYS[name])
    assert not used & set(converted.left_out)
    reasons = {"counts steps of training", "the numbers 0, 1, 2, ..."}
    assert set(converted.left_out.values()) <= reasons


def test_swin_is_refused_with_the_reason():
    with pytest.raises(Unreadable, match="Swin of|backbone is MMDetection's Swin.*take a teacher"):
        convert(full_size(SWIN))


def faster_rcnn_plus(extra, without=()):
    kept = {k: x for k, x in full_size(FASTER).items() if not k.startswith(tuple(without))}
    return {**kept, **{k: torch.empty(shape, device="meta") for k, shape in extra.items()}}


def test_mask_rcnn():
    mask = {f"roi_head.mask_head.convs.{i}.conv.weight": (256, 256, 3, 3) for i in range(4)}
    mask.update({f"roi_head.mask_head.convs.{i}.conv.bias": (256,) for i in range(4)})
    mask["roi_head.mask_head.upsample.weight"] = (256, 256, 2, 2)
    mask["roi_head.mask_head.upsample.bias"] = (256,)
    mask["roi_head.mask_head.conv_logits.weight"] = (80, 256, 1, 1)
    mask["roi_head.mask_head.conv_logits.bias"] = (80,)
    ours = detector_shapes("COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml")
    assert shapes(convert(faster_rcnn_plus(mask)).tensors) == ours
    mask = {k: x for k, x in mask.items() if "convs" not in k or "weight" in k}
    for norm in ("weight", "bias"):
        mask.update({f"roi_head.mask_head.convs.{i}.gn.{norm}": (256,) for i in range(4)})
    opts = ["MODEL.ROI_MASK_HEAD.NORM", "GN"]
    ours = detector_shapes("COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml", opts)
    assert shapes(convert(faster_rcnn_plus(mask)).tensors) == ours


def test_an_fpn_with_norms():
    state = dict(full_size("gfl_r50_fpn_1x_coco"))
    for conv in (f"neck.{kind}_convs.{i}" for kind in ("lateral", "fpn") for i in range(3)):
        del state[f"{conv}.conv.bias"]
        for x in ("weight", "bias", "running_mean", "running_var"):
            state[f"{conv}.bn.{x}"] = torch.empty(256, device="meta")
    names = convert(state).tensors
    assert {f"backbone.fpn_{x}3.norm.running_var" for x in ("lateral", "output")} <= {*names}
    assert "backbone.fpn_lateral5.weight" in names and not any("neck" in x for x in names)


def test_deformable_convolutions_are_refused():
    state = {**full_size("gfl_r50_fpn_1x_coco")}
    state["backbone.layer2.0.conv2.conv_offset.weight"] = torch.zeros(1)
    with pytest.raises(Unreadable, match=r"deformable .*layer2.0.conv2.conv_offset.weight.*take a"):
        convert(state)


@pytest.mark.parametrize("old", ["bbox_head.fc_cls", "bbox_head.2.fc_cls"])
def test_two_stage_files_of_version_1_are_known_by_their_names(old):
    new = {k: x for k, x in full_size(FASTER).items() if "roi_head." not in k}
    with pytest.raises(Unreadable, match=r"is of MMDetection 1.x, .*upgrade_model_version.py"):
        convert({**new, f"{old}.weight": torch.zeros(81, 8)})


def test_a_box_of_the_background_is_one_of_version_1():
    state = {**full_size(FASTER), "roi_head.bbox_head.fc_reg.weight": torch.zeros(4 * 81, 1024)}
    with pytest.raises(Unreadable, match="the background is the first class"):
        convert(state)


def test_cascade_rcnn():
    box_head = {
        "shared_fcs.0.weight": (1024, 12544),
        "shared_fcs.0.bias": (1024,),
        "shared_fcs.1.weight": (1024, 1024),
        "shared_fcs.1.bias": (1024,),
        "fc_cls.weight": (81, 1024),
        "fc_cls.bias": (81,),
        "fc_reg.weight": (4, 1024),
        "fc_reg.bias": (4,),
    }
    stages = {f"roi_head.bbox_head.{i}.{k}": s for i in range(3) for k, s in box_head.items()}
    state = faster_rcnn_plus(stages, without=["roi_head.bbox_head."])
    opts = ["MODEL.MASK_ON", False, "MODEL.RESNETS.DEPTH", 101]
    ours = detector_shapes("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", opts)
    assert shapes(convert(state).tensors) == ours


# What wraps a detector while it is trained, and what that adds
WRAPPERS = {
    "data parallel": ("module.", []),
    "MMRazor": ("architecture.", ["distiller.connectors.0.conv.weight", "teacher.neck.x"]),
    "MMRazor 0.x": ("architecture.model.", ["distiller.teacher.neck.x"]),
    "FGD, data parallel": ("module.student.", ["module.distill_losses.x.conv.weight"]),
    "a detector in a module": ("detector.", []),
    "semi-supervised": ("student.", ["teacher.backbone.conv1.weight"]),
    "CrossKD": ("", []),
    "teacher as a module": ("", ["teacher.backbone.conv1.weight", "teacher_model.neck.x"]),
}


@pytest.mark.parametrize("prefix, more", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_students(prefix, more):
    plain = full_size("retinanet_r18_fpn_1x_coco")
    wrapped = {f"{prefix}{k}": x for k, x in plain.items()}
    wrapped.update({k: torch.zeros(1) for k in more})
    assert is_mmdet(wrapped)
    converted = convert(wrapped)
    assert converted.tensors.keys() == convert(plain).tensors.keys()
    assert {k for k, why in converted.left_out.items() if why == "not the student's"} == set(more)


def test_what_losses_and_a_moving_average_keep_is_left_out():
    plain = full_size("retinanet_r18_fpn_1x_coco")
    more = {"bbox_head.loss_cls.edges", "bbox_head.loss_bbox.acc_sum", "ema_backbone_bn1_weight"}
    converted = convert({**plain, **{k: torch.zeros(1) for k in more}})
    assert more < converted.left_out.keys()
    assert converted.tensors.keys() == convert(plain).tensors.keys()


def test_names_that_no_rule_knows_stay_and_are_found_left_over():
    state = {**full_size("gfl_r50_fpn_1x_coco"), "bbox_head.extra.weight": torch.zeros(3)}
    converted = convert(state)
    assert converted.sources["bbox_head.extra.weight"] == "bbox_head.extra.weight"


def test_what_is_not_mmdetection():
    names = ["backbone.bottom_up.stem.conv1.weight", "roi_heads.box_head.fc1.weight", "fc.weight"]
    assert not is_mmdet(dict.fromkeys(names, torch.zeros(1)))


def test_first_names_of_fcos():
    state = full_size("fcos_r101-caffe_fpn_gn-head_ms-640-800-2x_coco")
    old = {k.replace("bbox_head.conv_", "bbox_head.fcos_"): x for k, x in state.items()}
    assert any("fcos_centerness" in k for k in old)
    assert shapes(convert(old).tensors) == shapes(convert(state).tensors)


def retinanet_head(num_ratios, num_scales, classes=2):
    """Prediction convs whose every output channel holds its (ratio, scale, class or side)."""
    state = {"neck.lateral_convs.0.conv.weight": torch.zeros(1)}
    for name, size in (("retina_cls", classes), ("retina_reg", 4)):
        order = torch.cartesian_prod(*(torch.arange(n) for n in (num_ratios, num_scales, size)))
        state[f"bbox_head.{name}.weight"] = order[:, :, None, None].float()
        state[f"bbox_head.{name}.bias"] = (order * torch.tensor([100, 10, 1])).sum(dim=1).float()
    return state


def check_scale_major(state, meta=None, names=("head.cls_score", "head.bbox_pred")):
    tensors = convert(state, meta).tensors
    for name in names:
        ratio, scale, last = tensors[f"{name}.weight"][:, :, 0, 0].unbind(dim=1)
        order = (scale * 100 + ratio * 10 + last).tolist()
        assert order == sorted(order)
        assert torch.equal(tensors[f"{name}.bias"], ratio * 100 + scale * 10 + last)


def test_anchors_go_from_by_ratio_to_by_scale():
    check_scale_major(retinanet_head(3, 3))
    check_scale_major(retinanet_head(1, 3))
    check_scale_major(retinanet_head(3, 1))


def test_unusual_anchors_need_the_config():
    state = retinanet_head(3, 2)
    with pytest.raises(Unreadable, match="6 anchors per location.*keep the 'meta'"):
        convert(state)
    anchors = "anchor_generator=dict(ratios=[0.5, 1.0, 2.0], scales_per_octave=2)"
    check_scale_major(state, {"cfg": f"model = dict(bbox_head=dict({anchors}))"})


def test_anchors_of_an_rpn_go_from_by_ratio_to_by_scale():
    names = {"retina_cls": "rpn_cls", "retina_reg": "rpn_reg"}
    state = {
        f"rpn_head.{names[name.split('.')[1]]}.{name.split('.')[2]}": x
        for name, x in retinanet_head(3, 2, classes=1).items()
        if name.startswith("bbox_head.")
    }
    with pytest.raises(Unreadable, match="6 anchors per location.*keep the 'meta'"):
        convert(state)
    anchors = "anchor_generator=dict(ratios=[0.5, 1.0, 2.0], scales=[4, 8])"
    meta = {"cfg": f"model = dict(rpn_head=dict({anchors}))"}
    head = "proposal_generator.rpn_head"
    check_scale_major(state, meta, (f"{head}.objectness_logits", f"{head}.anchor_deltas"))


def test_scales_are_stacked():
    state = {f"bbox_head.scales.{i}.scale": torch.tensor(1.0 + i) for i in (2, 0, 1)}
    assert convert(state).tensors["head.scales"].tolist() == [1.0, 2.0, 3.0]


def tower(bias):
    state = {"bbox_head.cls_convs.1.conv.weight": torch.ones(2, 2, 3, 3)}
    state["bbox_head.cls_convs.1.gn.weight"] = torch.ones(2)
    return {**state, "bbox_head.cls_convs.1.conv.bias": torch.ones(2)} if bias else state


@pytest.mark.parametrize("scale", [1.0, torch.ones(2)])
def test_a_scale_is_one_number(scale):
    state = {**full_size("gfl_r50_fpn_1x_coco"), "bbox_head.scales.4.scale": scale}
    with pytest.raises(Unreadable, match="its 'bbox_head.scales.4.scale' is not one number"):
        convert(state)


def test_biases_before_group_norm():
    converted = convert(tower(bias=False))
    assert converted.tensors["head.cls_subnet.3.bias"].tolist() == [0.0, 0.0]
    assert converted.sources["head.cls_subnet.3.bias"] is None
    assert convert(tower(bias=True)).tensors["head.cls_subnet.3.bias"].tolist() == [1.0, 1.0]


def test_no_bias_is_invented_without_group_norm():
    state = {"bbox_head.cls_convs.1.conv.weight": torch.ones(2, 2, 3, 3)}
    assert list(convert(state).tensors) == ["head.cls_subnet.2.weight"]

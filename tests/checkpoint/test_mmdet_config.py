"""What is read of the configs in MMDetection's files, of all its versions, without running them."""

import pytest

from d2kd.checkpoint.mmdet_config import read_config
from d2kd.checkpoint.mmdet_settings import (
    BOX_WEIGHTS,
    CLASSES,
    CODERS,
    DILATION,
    FCOS_OPTIONS,
    FORMAT,
    FROM_P5,
    FROM_RES5,
    GENERATOR,
    GROUPS,
    MEAN,
    MEANS,
    OFFSET,
    P6,
    POOLED,
    POOLER,
    RATIOS,
    RELU,
    RES5_STRIDE,
    RPN_WEIGHTS,
    SAMPLING,
    SIZES,
    STD,
    STRIDE,
    UPSAMPLING,
    file_settings,
)

RETINANET = """
    backbone=dict(type='ResNet', depth=50, style='pytorch'),
    neck=dict(
        type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, start_level=1,
        add_extra_convs='on_input', num_outs=5),
    bbox_head=dict(
        type='RetinaHead',
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0], strides=[8, 16]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[1.0, 1.0, 1.0, 1.0]))
"""
SETTINGS = {
    FORMAT: "RGB",
    MEAN: [123.675, 116.28, 103.53],
    STD: [58.395, 57.12, 57.375],
    STRIDE: False,
    RES5_STRIDE: 32,
    DILATION: 1,
    P6: FROM_RES5,
    RELU: False,
    UPSAMPLING: "nearest",
    GROUPS: 32,
    CODERS: ["DeltaXYWHBBoxCoder"],
    MEANS: [0.0, 0.0, 0.0, 0.0],
    BOX_WEIGHTS: [1.0, 1.0, 1.0, 1.0],
    SIZES: [[32 * s * 2 ** (i / 3) for i in range(3)] for s in (1, 2)],
    RATIOS: [0.5, 1.0, 2.0],
    OFFSET: 0.0,
    GENERATOR: "AnchorGenerator",
}
VERSION_3 = f"""
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True, pad_size_divisor=32),
    {RETINANET})
dataset_type = 'CocoDataset'
"""
# Written out, as by later versions of 2.x
VERSION_2 = f"""
model = dict(type='RetinaNet', pretrained='torchvision://resnet50', {RETINANET})
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
data = dict(test=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', transforms=[
        dict(type='Resize', keep_ratio=True),
        dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
             to_rgb=True)])]))
lr_config = dict(policy='step', step=[8, 11], warmup_ratio=1.0 / 1000)
"""
# The files of the config as they stand, base configs first, as by 2.0
VERSION_2_0 = f"""
/mnt/lustre/mmdetection/configs/_base_/models/retinanet_r50_fpn.py
model = dict(type='RetinaNet', {RETINANET})

/mnt/lustre/mmdetection/configs/_base_/datasets/coco_detection.py
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Normalize', **img_norm_cfg)]
data = dict(samples_per_gpu=2, test=dict(pipeline=test_pipeline))

/mnt/lustre/mmdetection/configs/retinanet_r101_fpn_1x_coco.py
_base_ = './retinanet_r50_fpn_1x_coco.py'
model = dict(pretrained='torchvision://resnet101', backbone=dict(depth=101))
"""


@pytest.mark.parametrize(
    "meta", [{"cfg": VERSION_3}, {"config": VERSION_2}, {"config": VERSION_2_0}]
)
def test_configs_of_all_versions(meta):
    assert file_settings(meta) == SETTINGS


def test_what_a_few_lines_stand_for_is_bounded():
    doubled = "a0 = [1]\n" + "".join(f"a{i} = [a{i - 1}, a{i - 1}]\n" for i in range(1, 80))
    assert file_settings({"cfg": f"{doubled}data = dict(x=a79)"}) == {}
    generator = "anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, ratios=[1.0],"
    generator += " strides=[8], scales_per_octave=1000000000)"
    settings = file_settings({"cfg": f"model = dict(bbox_head=dict({generator}))"})
    assert max(map(len, settings[SIZES])) <= 100


@pytest.mark.parametrize("classes", [5, True, [1, 2], {"a": 1}])
def test_classes_that_are_none_are_unknown(classes):
    assert file_settings({"CLASSES": classes}) == {}
    assert file_settings({"dataset_meta": {"classes": classes}}) == {}


def test_one_class_may_be_a_word():
    assert file_settings({"CLASSES": "person"}) == {CLASSES: ["person"]}


def test_later_assignments_change_earlier_ones():
    model = read_config({"config": VERSION_2_0})["model"]
    assert model["backbone"] == {"type": "ResNet", "depth": 101, "style": "pytorch"}
    replaced = "\nmodel = dict(neck=dict(_delete_=True, type='PAFPN'))"
    assert P6 not in file_settings({"config": VERSION_2_0 + replaced})


def test_caffe_and_fcos():
    config = """
norm = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
test_pipeline = [dict(type='Normalize', **norm)]
model = {'backbone': dict(type='ResNet', style='caffe'), 'neck': dict(type='FPN',
    add_extra_convs='on_output', relu_before_extra_convs=True),
    'bbox_head': dict(type='FCOSHead', norm_on_bbox=True, centerness_on_reg=False)}
"""
    assert file_settings({"config": config}) == {
        FORMAT: "BGR",
        MEAN: [102.9801, 115.9465, 122.7717],
        STD: [1.0, 1.0, 1.0],
        STRIDE: True,
        RES5_STRIDE: 32,
        DILATION: 1,
        P6: FROM_P5,
        RELU: True,
        UPSAMPLING: "nearest",
        GROUPS: 32,
        FCOS_OPTIONS: ["norm_on_bbox"],
    }


def test_stages_of_a_cascade():
    coder = "type='DeltaXYWHBBoxCoder', target_stds"
    stages = ", ".join(f"dict(bbox_coder=dict({coder}=[{s}, {s}]))" for s in (0.1, 0.05))
    config = f"model = dict(neck=dict(type='FPN'), roi_head=dict(bbox_head=[{stages}]))"
    assert file_settings({"cfg": config}) == {
        P6: POOLED,
        UPSAMPLING: "nearest",
        CODERS: ["DeltaXYWHBBoxCoder"],
        MEANS: [0.0, 0.0, 0.0, 0.0],
        BOX_WEIGHTS: [[10.0, 10.0], [20.0, 20.0]],
    }


def test_two_stage_detectors():
    coder = "bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.1, 0.0]"
    layer = "roi_layer=dict(type='RoIAlign', sampling_ratio=2, aligned=False)"
    config = f"""
model = dict(rpn_head=dict({coder}, target_stds=[0.5, 0.5])), roi_head=dict(
    bbox_roi_extractor=dict({layer}), bbox_head=dict({coder}, target_stds=[0.1, 0.2]))))
"""
    assert file_settings({"cfg": config}) == {
        CODERS: ["DeltaXYWHBBoxCoder"],
        MEANS: [0.0, 0.0, 0.1, 0.0],
        BOX_WEIGHTS: [10.0, 5.0],
        RPN_WEIGHTS: [2.0, 2.0],
        POOLER: "ROIAlign",
        SAMPLING: 2,
    }


@pytest.mark.parametrize(
    "change",
    [
        ("type='ResNet'", "type='mmdet.ResNet'"),
        ("type='FPN'", "type='mmdet.models.necks.fpn.FPN'"),
        ("type='AnchorGenerator'", "type='mmdet.AnchorGenerator'"),
        ("strides=[8, 16]", "strides=[(8, 8), (16, 16)]"),
        ("strides=[8, 16]", "strides=[1, 2], base_sizes=[8, 16]"),
        ("add_extra_convs='on_input'", "add_extra_convs=True"),
        ("target_stds=[1.0, 1.0, 1.0, 1.0]", "target_means=[0.0, 0.0, 0.0, 0.0]"),
        ("\n", "\r\n"),
        ("/mnt/lustre/mmdetection/configs/retina", "/mnt/my disk/configs/retina"),
    ],
    ids=lambda change: change[1],
)
def test_other_spellings_of_the_same(change):
    for meta in ({"cfg": VERSION_3}, {"config": VERSION_2_0}):
        changed = {key: text.replace(*change) for key, text in meta.items()}
        assert file_settings(changed) == SETTINGS


def test_extra_convolutions_as_2_0_says_it():
    neck = "dict(type='FPN', add_extra_convs=True, extra_convs_on_inputs=False)"
    assert file_settings({"config": f"model = dict(neck={neck})"})[P6] == FROM_P5


def test_what_is_odd_in_one_part_leaves_the_others():
    odd = VERSION_3.replace("add_extra_convs='on_input'", "add_extra_convs='on_moon'")
    expected = {k: x for k, x in SETTINGS.items() if k not in (P6, RELU, UPSAMPLING)}
    assert file_settings({"cfg": odd}) == expected


def test_coders_of_version_1():
    head = "dict(type='RetinaHead', anchor_ratios=[1.0], anchor_strides=[8], target_stds=[1.0])"
    settings = file_settings({"config": f"model = dict(bbox_head={head})"})
    assert settings == {GROUPS: 32, CODERS: ["LegacyDeltaXYWHBBoxCoder"]}


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": ("a", "b")},
        {"dataset_meta": {"classes": ["a", "b"]}},
        {"dataset_meta": {"CLASSES": ("a", "b")}},
    ],
)
def test_classes_without_a_config(meta):
    assert file_settings(meta) == {CLASSES: ["a", "b"]}


def test_nothing_is_run(tmp_path):
    marker = tmp_path / "run"
    config = f"""
import os
os.mkdir({str(marker)!r})
made = os.mkdir({str(marker)!r})
model = dict(depth=__import__('os').mkdir({str(marker)!r}), neck=dict(type='FPN', **made),
             backbone=eval("1"), lines=[os.sep], text=f"{{os.sep}}")
"""
    assert read_config({"cfg": config}) == {"model": {"neck": {"type": "FPN"}}}
    assert not marker.exists()


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {},
        {"cfg": None},
        {"cfg": 3},
        {"cfg": "model = dict("},
        {"cfg": "model = " + "-" * 100_000 + "1"},
        {"cfg": "model = " + "[" * 1000},
        {"cfg": "model = 3"},
        {"cfg": "model = dict(bbox_head=3, neck='FPN', backbone=[dict()])"},
        {"cfg": "model = dict(neck=dict(type='FPN', add_extra_convs='on_moon'))"},
        {"cfg": "model = dict(bbox_head=dict(bbox_coder=dict(target_stds=[0.0])))"},
        {"cfg": "model = dict(bbox_head=dict(anchor_generator=dict(type=3, strides=4)))"},
        {"cfg": "model = dict(data_preprocessor=dict(mean=1, std=2))"},
        {"cfg": "\0"},
        [1],
    ],
)
def test_what_cannot_be_understood_is_unknown(meta):
    assert file_settings(meta) == {}

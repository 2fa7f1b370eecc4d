"""The proof that weights arrived: what a file leaves unfilled or over, what it was trained for."""

import datetime
import logging

import pytest
import torch
import torchvision
from mmdet_cases import ALL, config, needs_reference, reference
from toys import STUDENTS, detector

from d2kd.checkpoint import load_teacher_weights, read_weights
from d2kd.checkpoint.mmdet_settings import RES5_STRIDE, STRIDE
from d2kd.checkpoint.verify import detector_settings, verify
from d2kd.config import read_config
from d2kd.distillation import build_detector
from d2kd.engine import DistillTrainer
from d2kd.errors import UserError

KEY = "DISTILL.TEACHER.WEIGHTS"
SHAPES = ["circle", "square", "triangle", "star", "ring", "cross", "hexagon"]


def changed(name, tmp_path, change):
    """A copy of a reference file after ``change`` of its content."""
    file = torch.load(reference(f"{name}.pth"), weights_only=True)
    change(file)
    path = str(tmp_path / "changed.pth")
    torch.save(file, path)
    return path


@pytest.fixture
def gfl():
    return build_detector(config("gfl"))


@needs_reference
@pytest.mark.parametrize("name", ALL)
def test_both_formats_and_bare_state_dicts(tmp_path, name):
    model, again = build_detector(config(name)), build_detector(config(name))
    assert read_weights(model, reference(f"{name}.pth"), KEY) == []
    file = torch.load(reference(f"{name}.pth"), weights_only=True)
    path = str(tmp_path / "published.pth")
    for content in (file, file["state_dict"], {"model": file["state_dict"]}):
        torch.save(content, path, _use_new_zipfile_serialization=False)
        assert read_weights(again, path, KEY) == []
        expected = model.state_dict()
        assert all(torch.equal(x, expected[k]) for k, x in again.state_dict().items())


@needs_reference
@pytest.mark.parametrize("prefix", ["student.", "module.", "architecture."])
def test_wrapped_students(tmp_path, gfl, prefix):
    def wrap(file):
        state = file["state_dict"]
        more = {f"teacher.{k}": x for k, x in state.items()}
        file["state_dict"] = {**{f"{prefix}{k}": x for k, x in state.items()}, **more}

    assert read_weights(gfl, changed("gfl", tmp_path, wrap), KEY) == []


MISSING = {
    "backbone.bn1.running_var": "backbone.bottom_up.stem.conv1.norm.running_var",
    "backbone.layer4.2.conv3.weight": "backbone.bottom_up.res5.2.conv3.weight",
    "neck.fpn_convs.4.conv.bias": "backbone.top_block.p7.bias",
    "bbox_head.reg_convs.3.gn.weight": "head.bbox_subnet.10.weight",
    "bbox_head.gfl_cls.bias": "head.cls_score.bias",
    "bbox_head.scales.2.scale": "head.scales",
}


@needs_reference
@pytest.mark.parametrize("theirs, ours", MISSING.items())
def test_a_missing_key_is_named(tmp_path, gfl, theirs, ours):
    path = changed("gfl", tmp_path, lambda file: file["state_dict"].pop(theirs))
    assert read_weights(gfl, path, KEY) == [ours]
    with pytest.raises(UserError, match="does not fill 1 of the detector's") as error:
        load_teacher_weights(gfl, path)
    assert ours in str(error.value)


@needs_reference
def test_every_single_missing_key_of_a_retinanet_is_named(tmp_path):
    model = build_detector(config("retinanet"))
    file = torch.load(reference("retinanet.pth"), weights_only=True)
    names = [k for k in file["state_dict"] if not k.endswith("num_batches_tracked")]
    for name in names[::25] + [k for k in names if "retina_" in k]:
        path = changed("retinanet", tmp_path, lambda file, k=name: file["state_dict"].pop(k))
        assert len(read_weights(model, path, KEY)) == 1, name


@needs_reference
def test_a_key_that_is_left_over_is_named_as_in_the_file(tmp_path, gfl):
    def add(file):
        file["state_dict"]["bbox_head.gfl_centerness.weight"] = torch.zeros(1, 32, 3, 3)

    with pytest.raises(UserError) as error:
        read_weights(gfl, changed("gfl", tmp_path, add), KEY)
    assert "no place for 1 of MMDetection's parameters (bbox_head.gfl_centerness.weight)" in str(
        error.value
    )


@needs_reference
def test_the_file_of_another_detector(gfl):
    with pytest.raises(UserError, match=r"no place for \d+ of MMDetection's.*atss_centerness"):
        read_weights(gfl, reference("atss.pth"), KEY)
    with pytest.raises(UserError, match="no place for"):
        read_weights(gfl, reference("faster_rcnn.pth"), KEY)


@needs_reference
def test_what_a_file_calls_its_version_does_not_matter(tmp_path, gfl):
    """Files of MMDetection 2.0's model zoo call themselves 1.0rc1."""
    version = {"mmdet_version": "1.0rc1+5f9f470"}
    path = changed("gfl", tmp_path, lambda file: file["meta"].update(version))
    assert read_weights(gfl, path, KEY) == []


@needs_reference
def test_another_shape_is_told(tmp_path):
    cfg = config("gfl", ["MODEL.GFL.REG_MAX", 8, "MODEL.FPN.RELU_BEFORE_P7", True])
    with pytest.raises(UserError, match="it does not fill 2 of the detector's") as error:
        load_teacher_weights(build_detector(cfg), reference("gfl.pth"), cfg.INPUT.FORMAT)
    shapes = "head.bbox_pred.weight is (68, 32, 3, 3) in the file, (36, 32, 3, 3) in the detector"
    assert shapes in str(error.value)
    assert "MODEL.FPN.RELU_BEFORE_P7 is True, in the file False" in str(error.value)


@needs_reference
@pytest.mark.parametrize("name", ALL)
def test_settings_of_the_file_are_those_of_the_detector(name):
    cfg = config(name)
    text = load_teacher_weights(
        build_detector(cfg), reference(f"{name}.pth"), cfg.INPUT.FORMAT, SHAPES
    )
    assert ", verified: pixels, strides, FPN, " in text and text.endswith(", classes")
    assert ("anchors, boxes" in text) == (name in ("retinanet", "atss", "faster_rcnn"))
    assert ("head" in text) == (name in ("fcos", "atss", "gfl"))
    assert ("regions" in text) == (name == "faster_rcnn") and "unverified" not in text


WRONG = {
    "MODEL.PIXEL_MEAN": ("gfl", ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]]),
    "MODEL.PIXEL_STD": ("gfl", ["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]),
    "INPUT.FORMAT": ("gfl", ["INPUT.FORMAT", "BGR"]),
    "MODEL.RESNETS.STRIDE_IN_1X1": ("gfl", ["MODEL.RESNETS.STRIDE_IN_1X1", True]),
    "MODEL.FPN.RELU_BEFORE_P7": ("gfl", ["MODEL.FPN.RELU_BEFORE_P7", True]),
    "MODEL.ATSS.BBOX_REG_WEIGHTS": ("atss", ["MODEL.ATSS.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)]),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (
        "retinanet",
        ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.4, 1.0, 2.5]]],
    ),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": (
        "retinanet",
        ["MODEL.RETINANET.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0)],
    ),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (
        "faster_rcnn",
        ["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)],
    ),
    "MODEL.RPN.BBOX_REG_WEIGHTS": (
        "faster_rcnn",
        ["MODEL.RPN.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0)],
    ),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": (
        "faster_rcnn",
        ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"],
    ),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": (
        "faster_rcnn",
        ["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2],
    ),
    "MODEL.ANCHOR_GENERATOR.OFFSET": ("retinanet", ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5]),
    "MODEL.ANCHOR_GENERATOR.SIZES": (
        "faster_rcnn",
        ["MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]],
    ),
}


@needs_reference
@pytest.mark.parametrize("key", WRONG)
def test_another_setting_is_refused_by_its_key(key):
    name, opts = WRONG[key]
    cfg = config(name, opts)
    with pytest.raises(UserError, match="trained with other settings") as error:
        load_teacher_weights(
            build_detector(cfg), reference(f"{name}.pth"), cfg.INPUT.FORMAT, SHAPES
        )
    differences = str(error.value).split("than the detector has: ")[1].split("; ")
    assert len(differences) == 2 and differences[0].startswith(f"{key} is ")
    assert differences[1] == "set the keys as in the file"


# In the config of a file, what no key of Detectron2 can be set to
OTHER = {
    "upsampling of the FPN": ("gfl", "num_outs=5", "num_outs=5, upsample_cfg=dict(mode='area')"),
    "groups of the head's GroupNorm": (
        "fcos",
        "type='FCOSHead'",
        "{}, norm_cfg=dict(num_groups=16)",
    ),
    "options of FCOS's head": ("fcos", "type='FCOSHead'", "{}, centerness_on_reg=True"),
    "coders of the boxes": ("retinanet", "type='DeltaXYWHBBoxCoder'", "type='TBLRBBoxCoder'"),
    "means of the box deltas": ("atss", "target_means=[0.0, ", "target_means=[0.1, "),
    "kind of the anchors": ("retinanet", "type='AnchorGenerator'", "type='LegacyAnchorGenerator'"),
}


@needs_reference
@pytest.mark.parametrize("name", OTHER)
def test_what_no_key_sets_is_refused(name, tmp_path):
    detector, old, new = OTHER[name]

    def change(file):
        assert old in file["meta"]["cfg"]
        file["meta"]["cfg"] = file["meta"]["cfg"].replace(old, new.format(old))

    path, cfg = changed(detector, tmp_path, change), config(detector)
    with pytest.raises(UserError, match=rf": {name} is .*; no key sets the {name}: give another"):
        load_teacher_weights(build_detector(cfg), path, cfg.INPUT.FORMAT, SHAPES)


@needs_reference
def test_what_the_config_of_a_file_leaves_out_is_unverified(tmp_path):
    def change(file):
        file["meta"]["cfg"] = file["meta"]["cfg"].replace("bbox_coder=", "of_another_version=")

    path, cfg = changed("faster_rcnn", tmp_path, change), config("faster_rcnn")
    text = load_teacher_weights(build_detector(cfg), path, cfg.INPUT.FORMAT, SHAPES)
    assert text.endswith("FPN, anchors, regions, classes; unverified: boxes")


@needs_reference
def test_anchors_in_another_order_are_refused():
    cfg = config("retinanet", ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[2.0, 1.0, 0.5]]])
    with pytest.raises(
        UserError, match=r"ASPECT_RATIOS is \[2.0, 1.0, 0.5\], in the file \[0.5, 1"
    ):
        load_teacher_weights(build_detector(cfg), reference("retinanet.pth"), cfg.INPUT.FORMAT)


@needs_reference
def test_the_mean_of_caffes_fcos_is_not_detectron2s():
    cfg = config("fcos", ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]])
    with pytest.raises(UserError, match=r"MODEL.PIXEL_MEAN is \[103.53.*in the file \[102.9801"):
        load_teacher_weights(build_detector(cfg), reference("fcos.pth"), cfg.INPUT.FORMAT)


@needs_reference
def test_order_of_classes(gfl):
    names = [*SHAPES[1::-1], *SHAPES[2:]]
    with pytest.raises(UserError, match="class 0 is 'square' in the data, 'circle' in the file"):
        load_teacher_weights(gfl, reference("gfl.pth"), "RGB", names)
    with pytest.raises(UserError, match="the data have 6 classes, the file 7"):
        load_teacher_weights(gfl, reference("gfl.pth"), "RGB", SHAPES[:-1])
    same = ["Circle", "square", "tri-angle", *SHAPES[3:]]
    assert "classes" in load_teacher_weights(gfl, reference("gfl.pth"), "RGB", same)


@needs_reference
def test_what_a_file_does_not_say_is_unverified(tmp_path, gfl):
    path = changed("gfl", tmp_path, lambda file: file.pop("meta"))
    text = load_teacher_weights(gfl, path, "BGR", SHAPES)
    assert text.endswith("unverified: the file does not say what it was trained with")
    path = changed("gfl", tmp_path, lambda file: file["meta"].pop("cfg"))
    text = load_teacher_weights(gfl, path, "BGR", SHAPES)
    assert text.endswith(", verified: classes; unverified: pixels")
    text = load_teacher_weights(gfl, reference("gfl.pth"), "RGB")
    assert text.endswith("; unverified: classes")


@needs_reference
def test_a_student_that_starts_from_other_settings_gets_a_warning(tmp_path, toy_dataset, caplog):
    train, val = toy_dataset
    start = ["MODEL.WEIGHTS", reference("gfl.pth"), "MODEL.DEVICE", "cpu"]
    data = ["DATASETS.TRAIN", (train,), "DATASETS.TEST", (val,)]
    start += ["OUTPUT_DIR", str(tmp_path), "MODEL.GFL.NUM_CLASSES", 6]
    for name, opts in (("same", []), ("other", ["MODEL.RESNETS.STRIDE_IN_1X1", True])):
        trainer = DistillTrainer(config("gfl", [*start, *data, *opts]))
        caplog.clear()
        trainer.resume_or_load(resume=False)
        told = [r.getMessage() for r in caplog.records if "Training starts from" in r.getMessage()]
        assert len(told) == (name == "other"), name
    assert "STRIDE_IN_1X1 is True, in the file False; set the keys as in the file" in told[0]


def test_files_of_detectron2_say_nothing(tmp_path, caplog):
    model = detector(STUDENTS["GFL"])
    torch.save({"model": model.state_dict(), "iteration": 99}, tmp_path / "model.pth")
    with caplog.at_level(logging.INFO):
        text = load_teacher_weights(model, str(tmp_path / "model.pth"), "BGR", ["a"])
    today = datetime.date.today()
    assert text.startswith(f"after 100 steps, written {today}, unverified")
    assert "Teacher: all" in caplog.text


def test_a_backbone_that_ends_before_res5_is_verified_as_far_as_it_goes():
    cfg = read_config("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", ["MODEL.DEVICE", "cpu"])
    model = build_detector(cfg)
    found = detector_settings(model, "BGR", ["a"])
    assert found[STRIDE] and RES5_STRIDE not in found
    assert verify({"CLASSES": ["a"]}, model, "w.pth", "BGR", ["a"]).startswith("verified: classes")


def test_an_empty_path_is_explained():
    with pytest.raises(UserError, match=f"{KEY} is empty"):
        load_teacher_weights(torch.nn.Linear(1, 1), "")


def test_a_model_with_such_names_of_its_own_is_read_as_it_is(tmp_path):
    model = torch.nn.Module()
    model.neck = torch.nn.Module()
    model.neck.fpn_convs = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert read_weights(model, str(tmp_path / "model.pth"), KEY) == []


def test_torchvisions_resnets_fill_a_backbone(tmp_path):
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    opts = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    opts += ["MODEL.BACKBONE.NAME", "build_resnet_fpn_p6p7_backbone"]
    opts += ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]
    ours = detector(STUDENTS["GFL"], opts)
    unfilled = read_weights(ours, str(tmp_path / "resnet18.pth"), "MODEL.WEIGHTS")
    assert not any("bottom_up" in name for name in unfilled)
    image = torch.rand(1, 3, 64, 64)
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = theirs.eval()(image)
        found = ours.eval().backbone.bottom_up(image)["res5"].mean(dim=(2, 3))
    assert torch.allclose(found, expected, atol=1e-5)

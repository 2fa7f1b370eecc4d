"""The shipped baselines: every one builds the detector that its name says."""

import glob
import os

import pytest
import torch
from detectron2.config import CfgNode, get_cfg

from d2kd.config import read_config
from d2kd.distillation import build_detector
from d2kd.model_zoo import CONFIG_DIRS, resolve_config
from d2kd.modeling.backbone.fpn import LastLevelP6P7WithoutReLU

DETECTORS = {
    "atss": "ATSS",
    "cascade": "GeneralizedRCNN",
    "faster": "GeneralizedRCNN",
    "fcos": "FCOS",
    "gfl": "GFL",
    "keypoint": "GeneralizedRCNN",
    "mask": "GeneralizedRCNN",
    "paper": "PaperFCOS",
    "retinanet": "RetinaNet",
}
# By the last word of a name; students on the larger drawn data set end with their depth
ITERATIONS = {"1x": 90000, "2x": 180000, "voc": 12416, "tiny": 750, "teacher": 1500, "18": 750}
BASELINES = {
    os.path.splitext(os.path.relpath(path, folder))[0]: path
    for folder in CONFIG_DIRS
    for path in sorted(glob.glob(os.path.join(folder, "**", "baselines", "*.yaml"), recursive=True))
}


@pytest.mark.parametrize("name", BASELINES)
def test_builds_what_its_name_says(name):
    cfg = read_config(BASELINES[name], ["MODEL.DEVICE", "meta", "MODEL.TIMM.PRETRAINED", False])
    assert f"output/{name}" == cfg.OUTPUT_DIR
    words = os.path.basename(name).split("_")
    assert ITERATIONS[words[-1]] == cfg.SOLVER.MAX_ITER
    with torch.device("meta"):  # shapes only
        detector = build_detector(cfg)
    assert DETECTORS[words[0]] in [c.__name__ for c in type(detector).__mro__]
    assert (words[0] == "mask") == cfg.MODEL.MASK_ON
    if "R" in words:
        assert words[words.index("R") + 1] == str(cfg.MODEL.RESNETS.DEPTH)
    assert (words[0] == "cascade") == (cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads")
    assert ("ms" in words) == (len(cfg.INPUT.MIN_SIZE_TRAIN) > 1 and "zoo" not in words)


PAPERS = [name for name in BASELINES if name.startswith("baselines/") and "zoo" not in name]


@pytest.mark.parametrize("name", PAPERS)
def test_is_trained_as_in_mmdetection(name):
    """But Detectron2's own FCOS."""
    cfg = read_config(BASELINES[name], ["MODEL.DEVICE", "meta", "MODEL.TIMM.PRETRAINED", False])
    with torch.device("meta"):
        detector = build_detector(cfg)
    own_fcos = type(detector).__name__ == "FCOS"
    caffe = own_fcos or (type(detector).__name__ == "PaperFCOS" and cfg.MODEL.RESNETS.DEPTH > 18)
    assert (cfg.INPUT.FORMAT == "BGR") == caffe
    assert ("MSRA" in cfg.MODEL.WEIGHTS) == caffe
    assert "_R_" not in name or caffe == cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert (0.0 if own_fcos else 0.0001) == cfg.SOLVER.WEIGHT_DECAY_NORM
    if "p7" in detector.backbone.output_shape():
        without = isinstance(detector.backbone.top_block, LastLevelP6P7WithoutReLU)
        assert without == (type(detector).__name__ in ("ATSS", "GFL", "RetinaNet"))


@pytest.mark.parametrize("name", ["retinanet_R_50_FPN", "faster_rcnn_R_50_FPN"])
def test_baselines_of_the_zoo_are_detectron2s(name):
    theirs = get_cfg()
    path = resolve_config(f"COCO-Detection/{name}_1x.yaml", "test")
    theirs.merge_from_file(path, allow_unsafe=True)
    ours = read_config(BASELINES[f"baselines/{name}_zoo_1x"])
    ours.MODEL.ROI_MASK_HEAD = theirs.MODEL.ROI_MASK_HEAD  # nobody reads it
    ours.MODEL.ANCHOR_GENERATOR.SIZES = [
        [pytest.approx(x, abs=1e-6) for x in sizes] for sizes in ours.MODEL.ANCHOR_GENERATOR.SIZES
    ]
    for node in ("MODEL", "INPUT", "DATASETS", "DATALOADER", "SOLVER", "TEST"):
        _check_same(ours[node], theirs[node], node)


def _check_same(ours, theirs, where):
    for key, value in theirs.items():
        if isinstance(value, CfgNode):
            _check_same(ours[key], value, f"{where}.{key}")
        else:
            assert ours[key] == value, f"{where}.{key}"


def test_there_are_baselines():
    kinds = {(os.path.dirname(n), os.path.basename(n).split("_")[0]) for n in BASELINES}
    coco, shapes = set(DETECTORS), set(DETECTORS) - {"cascade", "keypoint"}
    assert {kind for folder, kind in kinds if folder == "baselines"} == coco
    assert {kind for folder, kind in kinds if folder == "shapes/baselines"} == shapes

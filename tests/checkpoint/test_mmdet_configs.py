"""configs/mmdet: published detectors as configs, with what their tensors do not tell."""

import glob
import os
import re

import pytest
import torch
from test_mmdet_names import OURS, full_size, shapes

from d2kd.checkpoint.mmdet import convert
from d2kd.checkpoint.mmdet_settings import FROM_P5, FROM_RES5, POOLED
from d2kd.checkpoint.verify import detector_settings
from d2kd.config import read_config
from d2kd.distillation import build_detector
from d2kd.model_zoo import CONFIG_DIRS

CONFIGS = [
    path for d in CONFIG_DIRS for path in sorted(glob.glob(os.path.join(d, "mmdet", "*.yaml")))
]
KEYS_OF = {os.path.basename(ours): theirs for theirs, ours in OURS.items()}
RGB = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}
CAFFE_FCOS = {
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
}
P6 = {"retinanet": FROM_RES5, "faster": POOLED}


def test_there_are_configs():
    assert len(CONFIGS) == 17


@pytest.mark.parametrize("path", CONFIGS, ids=os.path.basename)
def test_names_the_published_file(path):
    cfg = read_config(path)
    kind, depth = re.match(r"([a-z]+)(?:_rcnn)?_R_(\d+)_", os.path.basename(path)).groups()
    folder = {"faster": "faster_rcnn"}.get(kind, kind)
    address = rf"https://download\.openmmlab\.com/mmdetection/v2\.0/{folder}/\S+_r{depth}_\S+"
    assert re.fullmatch(address + r"-[0-9a-f]{8}\.pth", cfg.MODEL.WEIGHTS)
    assert int(depth) == cfg.MODEL.RESNETS.DEPTH
    with open(path) as f:
        text = f.read()
    assert re.search(r"^# Published AP \d\d\.\d; not run here by us\.$", text, re.MULTILINE)
    assert "OUTPUT_DIR" not in text
    assert cfg.OUTPUT_DIR.endswith(os.path.join("mmdet", os.path.basename(path)[:-5]))


@pytest.mark.parametrize("path", CONFIGS, ids=os.path.basename)
def test_settings_are_those_of_mmdetections_configs(path):
    cfg = read_config(path)
    kind = os.path.basename(path).split("_")[0]
    cfg.MODEL.DEVICE, cfg.MODEL.FPN.OUT_CHANNELS = "cpu", 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
    found = detector_settings(build_detector(cfg), cfg.INPUT.FORMAT)
    wanted = dict(CAFFE_FCOS if kind == "fcos" else RGB)
    wanted["P6 (MODEL.BACKBONE.NAME)"] = P6.get(kind, FROM_P5)
    if kind != "faster":
        wanted["MODEL.FPN.RELU_BEFORE_P7"] = kind == "fcos"
    if cfg.MODEL.RESNETS.DEPTH >= 50:
        wanted["MODEL.RESNETS.STRIDE_IN_1X1"] = kind == "fcos"
    assert {k: v for k, v in found.items() if k in wanted} == wanted


@pytest.mark.parametrize("name", KEYS_OF)
def test_full_size_files_fit(name):
    path = next(p for p in CONFIGS if os.path.basename(p) == name)
    cfg = read_config(path)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        ours = shapes(build_detector(cfg).state_dict())
    assert shapes(convert(full_size(KEYS_OF[name])).tensors) == ours

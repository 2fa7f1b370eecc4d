"""The shipped baselines: every one builds the detector that its name says."""

import glob
import os

import pytest
import torch
from detectron2.config import get_cfg

from d2kd.config import add_distill_config, load_yaml
from d2kd.model_zoo import CONFIG_DIRS
from d2kd.modeling import build_detector

DETECTORS = {
    "atss": "ATSS",
    "faster": "GeneralizedRCNN",
    "fcos": "FCOS",
    "gfl": "GFL",
    "retinanet": "RetinaNet",
}
BASELINES = [
    f for d in CONFIG_DIRS for f in sorted(glob.glob(os.path.join(d, "baselines", "*.yaml")))
]


@pytest.mark.parametrize("path", BASELINES, ids=os.path.basename)
def test_builds_what_its_name_says(path):
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, path, ["MODEL.DEVICE", "meta", "MODEL.TIMM.PRETRAINED", False])
    name = os.path.splitext(os.path.basename(path))[0]
    with torch.device("meta"):  # shapes only
        detector = build_detector(cfg)
    assert DETECTORS[name.split("_")[0]] in [c.__name__ for c in type(detector).__mro__]
    if not cfg.MODEL.TIMM.NAME:
        assert f"_R_{cfg.MODEL.RESNETS.DEPTH}_FPN" in name
    iterations = {"1x": 90000, "2x": 180000, "voc": 12416}
    assert iterations[name.split("_")[-1]] == cfg.SOLVER.MAX_ITER
    assert name in cfg.OUTPUT_DIR


def test_there_are_baselines():
    assert {os.path.basename(f).split("_")[0] for f in BASELINES} == set(DETECTORS)

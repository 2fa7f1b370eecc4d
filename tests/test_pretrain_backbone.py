"""``tools/pretrain_backbone.py``: a file that fills the backbone of a detector, no more."""

import dataclasses
import os
import sys

import pytest
import torch
from detectron2.modeling import build_model

from d2kd.checkpoint.weights import SafeCheckpointer
from d2kd.config import read_config

TOOLS = os.path.join(os.path.dirname(__file__), os.pardir, "tools")
CONFIG = "shapes/baselines/retinanet_tiny.yaml"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import pretrain_backbone

    monkeypatch.setattr(pretrain_backbone, "VALIDATION_IMAGES", 8)
    return pretrain_backbone


def run(tool, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["pretrain_backbone.py", CONFIG, *words])
    tool.main()


def test_the_file_fills_the_backbone_of_the_detector(tool, tmp_path, monkeypatch, capsys):
    file = tmp_path / "made" / "backbone.pth"
    run(tool, monkeypatch, "--steps", "2", "MODEL.WEIGHTS", str(file))
    assert f"{file}: names " in capsys.readouterr().out
    saved = torch.load(file, weights_only=True)["model"]
    cfg = read_config(CONFIG)
    detector = build_model(cfg)
    names = {n for n in detector.state_dict() if n.startswith("backbone.bottom_up.")}
    assert saved.keys() == names
    first = detector.backbone.bottom_up.stem.conv1.weight.detach().clone()
    SafeCheckpointer(detector).load(str(file))
    assert not torch.equal(detector.backbone.bottom_up.stem.conv1.weight, first)
    state = detector.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in names)
    assert saved["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] == 2


def test_a_file_that_is_there_stays(tool, tmp_path, monkeypatch, capsys):
    file = tmp_path / "backbone.pth"
    file.write_bytes(b"mine")
    for weights, words in ((str(file), "delete it to train anew"), ("", "give the .pth file")):
        with pytest.raises(SystemExit):
            run(tool, monkeypatch, "MODEL.WEIGHTS", weights)
        assert words in capsys.readouterr().err
    assert file.read_bytes() == b"mine"


def test_it_learns(tool, monkeypatch):
    two = dataclasses.replace(tool.SINGLE, classes=("ring", "square"))
    monkeypatch.setattr(tool, "SINGLE", two)
    monkeypatch.setattr(tool, "VALIDATION_IMAGES", 200)
    _, right = tool.pretrain(read_config(CONFIG), 80)
    assert right > 0.65  # half of them by chance


def test_images_are_as_the_detector_reads_them(tool):
    bgr = tool.SingleShapes(read_config(CONFIG), "val", 4)
    rgb = tool.SingleShapes(read_config(CONFIG, ["INPUT.FORMAT", "RGB"]), "val", 4)
    assert torch.equal(rgb[3][0], bgr[3][0].flip(0)) and rgb[3][1] == bgr[3][1]
    assert rgb[0][0].shape == (3, 48, 48) and rgb[0][0].abs().max() < 2.3

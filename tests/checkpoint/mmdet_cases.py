"""Small detectors of MMDetection, and what MMDetection computes with them: files outside of the
repository, in the folder that D2KD_REFERENCE names."""

import os

import numpy as np
import pytest
import torch

from d2kd.checkpoint import read_weights
from d2kd.config import read_config
from d2kd.distillation import build_detector

FOLDER = os.path.join(os.environ.get("D2KD_REFERENCE", ""), "mmdet")
needs_reference = pytest.mark.skipif(
    not os.path.isfile(os.path.join(FOLDER, "gfl.npz")), reason="D2KD_REFERENCE is not set"
)
DENSE = ["retinanet", "fcos", "atss", "gfl"]
ALL = [*DENSE, "faster_rcnn"]


def reference(name):
    """The path of a reference file."""
    return os.path.join(FOLDER, name)


def config(name, opts=()):
    """The reference's detector as it was trained; its YAML says nothing of the ReLU before P7."""
    relu = name in ("fcos", "faster_rcnn")
    opts = ["MODEL.FPN.RELU_BEFORE_P7", relu, *opts]
    return read_config(reference(f"{name}.yaml"), opts)


class Case:
    """A filled detector in eval mode, its input, and MMDetection's numbers."""

    def __init__(self, name):
        cfg = config(name)
        self.name = name
        self.detector = build_detector(cfg).eval()
        self.unfilled = read_weights(self.detector, reference(f"{name}.pth"), "MODEL.WEIGHTS")
        self.arrays = np.load(reference(f"{name}.npz"))
        order = slice(None, None, -1 if cfg.INPUT.FORMAT == "RGB" else 1)
        pixels = [self.arrays[f"image/{i}"][:, :, order].transpose(2, 0, 1) for i in range(2)]
        self.inputs = [{"image": torch.from_numpy(x.copy())} for x in pixels]
        with torch.no_grad():
            self.images = self.detector.preprocess_image(self.inputs)
            self.stages = self.detector.backbone.bottom_up(self.images.tensor)
            self.levels = self.detector.backbone(self.images.tensor)

    def expected(self, key):
        """A stored array, anchors in Detectron2's order."""
        x = torch.from_numpy(self.arrays[key])
        if self.name != "retinanet":
            return x
        # 3 ratios, then 3 scales -> 3 scales, then 3 ratios
        if key.startswith("anchors/"):
            return x.view(-1, 3, 3, 4).transpose(1, 2).reshape(-1, 4)
        if "/cls/" in key or "/bbox/" in key:
            return x.unflatten(1, (3, 3, -1)).transpose(1, 2).flatten(1, 3)
        return x

    def error(self, value, key):
        """Largest deviation from a stored array, relative to its largest number."""
        expected = self.expected(key).double()
        assert value.shape == expected.shape, key
        return ((value.double() - expected).abs().max() / expected.abs().max()).item()

    def head_outputs(self, features):
        """Of a dense detector: class logits, boxes and, if there is one, centerness, by level."""
        with torch.no_grad():
            outputs = self.detector.head(list(features.values()))
        names = ("cls", "bbox", "centerness")
        return {
            f"{name}/{level}": x
            for name, levels in zip(names, outputs)
            for level, x in zip(features, levels)
        }

#!/usr/bin/env python
"""AP of a CrossKD student by its own head, and by the teacher's: what its features are worth, and
what its own last blocks make of them.

    python tools/cross_predictions.py shapes/crosskd_fcos_tiny.yaml \\
        MODEL.WEIGHTS output/shapes/crosskd_fcos_tiny/model_final.pth

Predictions "by the teacher's head" are those that CrossKD trains: the student's features, aligned
with the teacher's statistics of each image, through the rest of the teacher's towers.
"""

import argparse
import contextlib
import io
from typing import Dict, List

import torch
from compare import METRICS, read_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling.postprocessing import detector_postprocess
from tabulate import tabulate
from torch import nn

from d2kd.engine import DistillTrainer
from d2kd.errors import UserError
from d2kd.modeling import StudentView, TeacherStudent, build_model
from d2kd.modeling.recorder import Recorder


class CrossDetector(nn.Module):
    """Detects with the student's features in the teacher's head."""

    def __init__(self, model: TeacherStudent):
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, batched_inputs: List[dict]) -> List[dict]:
        model, student = self.model, self.model.student
        method = model.distillers["CrossKD"]
        terms = {"CrossKD": method.terms}
        images = student.preprocess_image(batched_inputs)
        with Recorder(model.family.taps(model.needs(terms, "student"))) as recorder:
            features = student.backbone(images.tensor)
            features = [features[name] for name in student.head_in_features]
            own = model.family.dense_head.predictions(student.head(features))
        view = StudentView(model.family, recorder, images.image_sizes)
        teacher = model.teacher.view(batched_inputs, view, model.needs(terms, "teacher"))
        crossed = {**own._asdict(), **method.predictions(view, teacher)}
        predictions = [x for x in crossed.values() if x is not None]
        found = student.forward_inference(images, features, predictions)
        return [
            {"instances": detector_postprocess(x, y["height"], y["width"])}
            for x, y in zip(found, batched_inputs)
        ]


def evaluate(cfg: CfgNode, detector: nn.Module) -> Dict[str, float]:
    """The metrics on ``DATASETS.TEST``."""
    with contextlib.redirect_stdout(io.StringIO()):
        results = DistillTrainer.test(cfg, detector)["bbox"]
    return {m: results[m] for m in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a recipe of CrossKD")
    parser.add_argument("opts", nargs="*", help="KEY VALUE ...; MODEL.WEIGHTS is the student")
    args = parser.parse_args()
    try:
        cfg = read_config(args.config, args.opts)
        model = build_model(cfg).eval()
        if not isinstance(model, TeacherStudent) or "CrossKD" not in model.distillers:
            raise UserError(f"DISTILL.METHODS is {list(cfg.DISTILL.METHODS)}: CrossKD is not in it")
        if model.distillers["CrossKD"].adapters:
            raise UserError("student and teacher have towers of different width: give equal ones")
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    DetectionCheckpointer(model.student).load(cfg.MODEL.WEIGHTS)
    detectors = {"student's own head": model.student, "teacher's head": CrossDetector(model)}
    rows = {name: evaluate(cfg, detector.eval()) for name, detector in detectors.items()}
    body = [[name, *(f"{results[m]:.1f}" for m in METRICS)] for name, results in rows.items()]
    print(tabulate(body, ["", *METRICS], "github", disable_numparse=True))


if __name__ == "__main__":
    main()

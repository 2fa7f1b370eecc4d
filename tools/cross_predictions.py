#!/usr/bin/env python
"""AP of a CrossKD student by its own head, and by the teacher's: what its features are worth, and
what its own last blocks make of them.

    python tools/cross_predictions.py shapes/crosskd/fcos_tiny.yaml \\
        MODEL.WEIGHTS output/shapes/crosskd/fcos_tiny/model_final.pth

Predictions "by the teacher's head" are those that CrossKD trains: the student's features, aligned
with the teacher's statistics of each image, through the rest of the teacher's towers.
"""

import argparse
from typing import List

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from tabulate import tabulate
from torch import nn

from d2kd.checkpoint import load_trained_weights
from d2kd.config import read_config
from d2kd.distillation import TeacherStudent, build_model
from d2kd.distillation.teacher import TeacherPass
from d2kd.engine import DistillTrainer
from d2kd.engine.results import METRICS
from d2kd.errors import UserError
from d2kd.views import Recorder, StudentView


class CrossDetector(nn.Module):
    """Detects with the student's features in the teacher's head."""

    def __init__(self, model: TeacherStudent):
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, batched_inputs: List[dict]) -> List[dict]:
        model, student = self.model, self.model.student
        method = model.distillers["CrossKD"]
        ours, theirs = model.active_reads({"CrossKD": method.terms})
        images = student.preprocess_image(batched_inputs)
        with Recorder(model.family.observed(ours)) as recorder:
            features = student.backbone(images.tensor)
            features = [features[name] for name in student.head_in_features]
            own = model.family.dense_head.predictions(student.head(features))
        view = StudentView(model.family, ours, recorder, images.image_sizes, targets=[])
        teacher_pass = TeacherPass(model.teacher, batched_inputs, theirs)
        teacher_pass.run_backbone(images.tensor)
        crossed = {**own._asdict(), **method.predictions(view, teacher_pass.finish(targets=[]))}
        predictions = [x for x in crossed.values() if x is not None]
        found = student.forward_inference(images, features, predictions)
        return [
            {"instances": detector_postprocess(x, y["height"], y["width"])}
            for x, y in zip(found, batched_inputs)
        ]


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
        load_trained_weights(model.student, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", args.config)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    detectors = {"student's own head": model.student, "teacher's head": CrossDetector(model)}
    body = []
    for name, detector in detectors.items():
        results = DistillTrainer.test(cfg, detector.eval())["bbox"]
        body.append([name, *(f"{results[metric]:.1f}" for metric in METRICS)])
    print(tabulate(body, ["", *METRICS], "github", disable_numparse=True))


if __name__ == "__main__":
    main()

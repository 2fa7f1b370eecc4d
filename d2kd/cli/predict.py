"""Runs a trained student on images, draws what it finds and writes it as JSON.

examples:
  d2kd predict output/shapes/frs/fcos_tiny images
  d2kd predict output/run one.jpg 'more/*.png' --threshold 0.3 --output found

The output folder has a picture per image, and predictions.json with the detections of all: file,
size, and per detection its box (x, y, width, height), class and score.
"""

import argparse
import os

from d2kd.engine.trained_run import open_run
from d2kd.errors import UserError
from d2kd.prediction import Predictor, image_files
from d2kd.prediction.folder import PREDICTIONS, predict_into

from .arguments import add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its checkpoint")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="files, folders or patterns")
    parser.add_argument(
        "--output", metavar="DIR", help="where to write; must be empty (default: RUN/predict)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="lowest score to keep (default: 0.5)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold}: give a score from 0 to 1")
    run, paths = open_run(args.run), image_files(args.images)
    folder = args.output or os.path.join(run.folder, "predict")
    predictor = Predictor(run.student(args.device), run.student_config())
    summary = predict_into(folder, predictor, paths, run.classes, args.threshold)
    skipped = f", {len(summary.skipped)} files skipped" if summary.skipped else ""
    print(
        f"{summary.detections} detections in {summary.images} images{skipped}: "
        f"{os.path.join(folder, PREDICTIONS)}"
    )

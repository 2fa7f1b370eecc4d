#!/usr/bin/env python
"""Shows distillation at work on the embedded data, on a CPU, in minutes: ``make demo``.

A small FCOS is trained alone and with FRS from a teacher that comes with d2kd, same seed and
schedule. Writes a table, a plot and a picture to ``output/demo``.
"""

import os
import sys
import warnings
from typing import Dict, List

import cv2
import matplotlib
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode, Instances
from torch import nn

from d2kd.checkpoint import load_trained_weights
from d2kd.comparison.cells import Cell, cell_of, parameters
from d2kd.comparison.rows import row_of
from d2kd.comparison.runs import Run, scalars, train_rows
from d2kd.comparison.tables import table
from d2kd.config import read_config
from d2kd.distillation import build_detector
from d2kd.engine import DistillTrainer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUTPUT = "output/demo"
TEACHER, TEACHER_WEIGHTS = "shapes/baselines/fcos_tiny_teacher.yaml", "d2kd://fcos_tiny_teacher.pth"
STUDENTS = {
    "plain student": "shapes/baselines/fcos_tiny.yaml",
    "student with FRS": "shapes/frs/fcos_tiny.yaml",
}
OPTS = ["TEST.EVAL_PERIOD", "150"]
DETECTION_LOSSES = ("loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr")
DISTILLATION_LOSSES = ("loss_frs_feature", "loss_frs_cls")


def plot_curves(runs: Dict[str, Run], teacher_ap: float, path: str) -> None:
    """AP and losses over iterations."""
    _, (ap, loss) = plt.subplots(1, 2, figsize=(11, 4))
    for label, run in runs.items():
        aps = scalars(run.folder, "bbox/AP")
        ap.plot([i + 1 for i in aps], list(aps.values()), marker="o", label=label)
        parts = [scalars(run.folder, name) for name in DETECTION_LOSSES]
        loss.plot(list(parts[0]), [sum(p[i] for p in parts) for i in parts[0]], label=label)
    for name in DISTILLATION_LOSSES:
        values = scalars(run.folder, name)
        loss.plot(list(values), list(values.values()), linestyle="--", label=name)
    ap.axhline(teacher_ap, color="grey", linestyle=":", label="teacher")
    ap.set(xlabel="iteration", ylabel="AP", title="AP on shapes_tiny_val", ylim=(0, None))
    loss.set(xlabel="iteration", title="detection losses, and FRS's terms", ylim=(0, 4))
    for axes in (ap, loss):
        axes.grid(alpha=0.3)
        axes.legend()
    plt.tight_layout()
    plt.savefig(path, dpi=110)


def trained(config_file: str, weights: str) -> nn.Module:
    """A detector with its trained weights, in eval mode."""
    detector = build_detector(read_config(config_file)).eval()
    load_trained_weights(detector, weights, "the weights", config_file)
    return detector


@torch.no_grad()
def draw_detections(detectors: Dict[str, tuple], path: str, num_images: int = 4) -> None:
    """Ground truth and detections side by side, one image per row. Of every detector, as many
    detections are drawn as there are objects, those of the highest scores.

    Args:
        detectors: (config file, weights) by label.
        path: of the picture.
        num_images: images with three objects, from the start of the validation set.
    """
    name = read_config(TEACHER).DATASETS.TEST[0]
    classes = MetadataCatalog.get(name).thing_classes
    dicts = [d for d in DatasetCatalog.get(name) if len(d["annotations"]) == 3][:num_images]
    images = [cv2.imread(d["file_name"]) for d in dicts]
    columns = {"ground truth": [[_object(a) for a in d["annotations"]] for d in dicts]}
    inputs = [{"image": torch.from_numpy(i.transpose(2, 0, 1).copy())} for i in images]
    for label, (config_file, weights) in detectors.items():
        detector = trained(config_file, weights)
        columns[label] = [_best(output["instances"], 3) for output in detector(inputs)]

    figure, axes = plt.subplots(num_images, len(columns), figsize=(11, 11 * num_images / 4))
    for (label, rows), column in zip(columns.items(), axes.T):
        column[0].set_title(label)
        for image, boxes, cell in zip(images, rows, column):
            cell.imshow(image[:, :, ::-1])
            cell.axis("off")
            for (x0, y0, x1, y1), k, score in boxes:
                colour = f"C{k}"
                cell.add_patch(
                    plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=2)
                )
                style = {"facecolor": colour, "edgecolor": "none", "pad": 1}
                text = f"{classes[k]} {score}"
                cell.text(x0, y0, text, color="white", fontsize=8, bbox=style, clip_on=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def _object(annotation: dict) -> tuple:
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return box, annotation["category_id"], ""


def _best(found: Instances, count: int) -> List[tuple]:
    """(box, class, score in percent) of the detections with the highest scores."""
    found = found[found.scores.argsort(descending=True)[:count]]
    scores = [f"{score:.0%}" for score in found.scores.tolist()]
    return list(zip(found.pred_boxes.tensor.tolist(), found.pred_classes.tolist(), scores))


def main() -> None:
    warnings.filterwarnings("ignore", "torch.meshgrid")  # how Detectron2 calls it
    os.makedirs(OUTPUT, exist_ok=True)
    print("Training a small detector alone, and the same one with a teacher.", flush=True)
    rows = {label: row_of(config) for label, config in STUDENTS.items()}
    outcome = train_rows([(row, 1) for row in rows.values()], OUTPUT, OPTS)
    if outcome.failures:
        sys.exit(f"error: {outcome.problem()}")
    runs = dict(zip(rows, outcome.runs))
    cells = {label: [cell_of(label, rows[label], 1, run, OPTS)] for label, run in runs.items()}
    detector = trained(TEACHER, TEACHER_WEIGHTS)
    results = DistillTrainer.test(read_config(TEACHER), detector)["bbox"]
    teacher = Cell("teacher", TEACHER, [], 1, results, 0.0, parameters(TEACHER), {})
    text = table({"teacher": [teacher], **cells}, baseline="plain student")
    with open(os.path.join(OUTPUT, "table.md"), "w") as f:
        f.write(text + "\n")

    plot_curves(runs, results["AP"], os.path.join(OUTPUT, "curves.png"))
    weights = {k: os.path.join(run.folder, "model_final.pth") for k, run in runs.items()}
    students = {k: (STUDENTS[k], w) for k, w in weights.items()}
    detectors = {"teacher": (TEACHER, TEACHER_WEIGHTS), **students}
    draw_detections(detectors, os.path.join(OUTPUT, "detections.jpg"))
    print(f"\n{text}\n\n{OUTPUT}/: table.md, curves.png, detections.jpg")
    print(f"The distilled student, a plain Detectron2 checkpoint: {weights['student with FRS']}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Evaluates random detections with pycocotools and with faster-coco-eval, and compares the two.

python tools/compare_evaluators.py
python tools/compare_evaluators.py --images 500

The default is the size of COCO's val2017.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import tempfile
import time
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

from d2kd.engine.coco_evaluation import FasterCOCOEvaluator

WIDTH, HEIGHT = 640, 480


def random_annotations(
    images: int, classes: int, objects: int, random: np.random.Generator
) -> Dict[str, Any]:
    """Annotations in COCO's format, boxes alone; one in fifty is a crowd. Ids have gaps."""
    boxes = random_boxes(objects, random)
    annotations = [
        {
            "id": i + 1,
            "image_id": int(random.integers(images)),
            "category_id": 2 * int(random.integers(classes)) + 1,
            "bbox": box.tolist(),
            "area": float(box[2] * box[3]),
            "iscrowd": int(random.random() < 0.02),
        }
        for i, box in enumerate(boxes)
    ]
    return {
        "info": {},
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT} for i in range(images)],
        "categories": [{"id": 2 * i + 1, "name": f"class {i}"} for i in range(classes)],
        "annotations": annotations,
    }


def random_boxes(count: int, random: np.random.Generator) -> np.ndarray:
    """(count, 4) as x, y, width, height in pixels; half of the sides are below 80."""
    size = np.exp(random.uniform(np.log(8), np.log(400), (count, 2)))
    corner = random.random((count, 2)) * (np.array([WIDTH, HEIGHT]) - size)
    return np.concatenate([corner, size], axis=1)


def random_detections(
    data: Dict[str, Any], per_image: int, random: np.random.Generator
) -> List[Tuple[Dict, Dict]]:
    """A model's input and output for every image: its objects, badly aligned, and boxes
    at random places, with lower scores, for the rest. Many scores are equal."""
    objects: Dict[int, List[Dict]] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    return [
        ({"image_id": image}, {"instances": _detected(found, per_image, data, random)})
        for image, found in objects.items()
    ]


def _detected(
    objects: List[Dict], count: int, data: Dict[str, Any], random: np.random.Generator
) -> Instances:
    found = objects[:count]
    near = np.array([a["bbox"] for a in found]).reshape(-1, 4)
    near = near * random.normal(1, 0.06, near.shape)
    boxes = np.concatenate([near, random_boxes(count - len(found), random)])
    classes = random.integers(len(data["categories"]), size=count)
    classes[: len(found)] = [a["category_id"] // 2 for a in found]
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.tensor(boxes))
    scores = random.random(count) ** np.where(np.arange(count) < len(found), 0.3, 3.0)
    instances.scores = torch.tensor(scores.round(2))
    instances.pred_classes = torch.tensor(classes)
    return instances


def register(name: str, data: Dict[str, Any], path: str) -> None:
    """Writes annotations to a file and gives an evaluator of Detectron2's what it needs to know."""
    with open(path, "w") as f:
        json.dump(data, f)
    ids = {category["id"]: i for i, category in enumerate(data["categories"])}
    MetadataCatalog.get(name).set(
        json_file=path,
        thing_classes=[category["name"] for category in data["categories"]],
        thing_dataset_id_to_contiguous_id=ids,
    )


def evaluate(
    evaluator: COCOEvaluator,
    detections: List[Tuple[Dict, Dict]],
    img_ids: Optional[List[int]] = None,
) -> Dict[str, Dict]:
    """The metrics by task, of all images or some; nothing is printed."""
    evaluator.reset()
    evaluator.process(*zip(*detections))
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate(img_ids)


def largest_difference(one: Dict[str, Dict], other: Dict[str, Dict]) -> float:
    """In points of AP, over all metrics and classes."""
    differences = [
        0.0 if np.isnan(value) and np.isnan(other[task][name]) else abs(value - other[task][name])
        for task, values in one.items()
        for name, value in values.items()
    ]
    return max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--objects", type=int, help="in all images; 7.3 per image, as COCO has")
    parser.add_argument("--detections", type=int, default=100, help="per image")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    random = np.random.default_rng(args.seed)
    objects = args.objects or round(7.3 * args.images)
    data = random_annotations(args.images, args.classes, objects, random)
    detections = random_detections(data, args.detections, random)
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        register("random", data, os.path.join(folder, "annotations.json"))
        for name, kind, options in (
            ("pycocotools", COCOEvaluator, {"use_fast_impl": False}),
            ("faster-coco-eval", FasterCOCOEvaluator, {}),
        ):
            start = time.perf_counter()
            evaluator = kind("random", output_dir=folder, **options)
            results.append(evaluate(evaluator, detections))
            seconds = time.perf_counter() - start
            rows.append([name, f"{seconds:.1f}", f"{results[-1]['bbox']['AP']:.4f}"])
    print(f"{args.images} images, {objects} objects, {args.detections} detections per image")
    print(tabulate(rows, headers=["", "seconds", "AP"], disable_numparse=True))
    print(f"largest difference of a metric or class: {largest_difference(*results):.1e}")


if __name__ == "__main__":
    main()

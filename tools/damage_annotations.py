#!/usr/bin/env python
"""Takes annotations away, or gives them a wrong class: what training makes of bad ground truth.

python tools/damage_annotations.py datasets/shapes_tiny/annotations/instances_train.json \\
    datasets/shapes_tiny/annotations/instances_train_wrong30.json --wrong 0.3
"""

import argparse
import json
import sys
from typing import Any, Dict, List

import numpy as np

from d2kd.writing import atomic_write


def damaged(coco: Dict[str, Any], wrong: float, missing: float, seed: int) -> Dict[str, Any]:
    """
    Args:
        coco: instances in COCO's format, of at least two categories where any is to be wrong.
        wrong: share of the annotations that get another category, each of the others as often.
        missing: share of the annotations that are left out; none of these is one of the wrong ones.
        seed: of the draw.

    Returns:
        the same images with damaged annotations.
    """
    generator = np.random.default_rng(seed)
    annotations = coco["annotations"]
    count = len(annotations)
    drawn = generator.permutation(count)
    left_out = set(drawn[: round(missing * count)].tolist())
    misnamed = set(drawn[len(left_out) : len(left_out) + round(wrong * count)].tolist())
    categories = [category["id"] for category in coco["categories"]]
    kept: List[Dict[str, Any]] = []
    for i, annotation in enumerate(annotations):
        if i in left_out:
            continue
        if i in misnamed:
            others = [c for c in categories if c != annotation["category_id"]]
            annotation = {**annotation, "category_id": others[generator.integers(len(others))]}
        kept.append(annotation)
    return {**coco, "annotations": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage annotations in COCO's format.")
    parser.add_argument("source", help="JSON of instances")
    parser.add_argument("output", help="JSON to write")
    parser.add_argument("--wrong", type=float, default=0.0, help="share with a wrong class")
    parser.add_argument("--missing", type=float, default=0.0, help="share to leave out")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    args = parser.parse_args()
    if min(args.wrong, args.missing) < 0 or not 0 < args.wrong + args.missing <= 1:
        sys.exit(f"--wrong is {args.wrong}, --missing {args.missing}: give shares of at most 1")
    with open(args.source) as f:
        coco = json.load(f)
    worse = damaged(coco, args.wrong, args.missing, args.seed)
    with atomic_write(args.output) as f:
        json.dump(worse, f)
    print(f"{args.output}: {len(worse['annotations'])} of {len(coco['annotations'])} annotations")


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Times DeFeat's object masks against a loop over boxes, side by side in one process.

python tools/benchmark_masks.py
python tools/benchmark_masks.py --device cuda
"""

import argparse
import math
import statistics
import time
from typing import Callable, List, Sequence, Tuple

import torch
from tabulate import tabulate
from torch import Tensor

from d2kd.layers.masks import FINEST_SCALE, object_masks

STRIDES = [4, 8, 16, 32, 64]
HEIGHT, WIDTH = 800, 1344


def loop_masks(
    boxes: Sequence[Tensor], sizes: Sequence[Tuple[int, int]], strides: Sequence[int]
) -> List[Tensor]:
    """What :func:`object_masks` gives, box by box."""
    masks = [boxes[0].new_zeros((len(boxes), *size), dtype=torch.bool) for size in sizes]
    for image, boxes_of_image in enumerate(boxes):
        for x1, y1, x2, y2 in boxes_of_image.tolist():
            scale = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
            level = math.floor(math.log2(scale / FINEST_SCALE + 1e-6))
            level = min(max(level, 0), len(sizes) - 1)
            (h, w), stride = sizes[level], strides[level]
            left, top = max(int(x1 / stride), 0), max(int(y1 / stride), 0)
            right, bottom = min(int(x2 / stride), w), min(int(y2 / stride), h)
            if left == right or top == bottom:
                left, top = min(left, w - 1), min(top, h - 1)
                right, bottom = left + 1, top + 1
            masks[level][image, top:bottom, left:right] = True
    return masks


def random_boxes(images: int, count: int, device: str) -> List[Tensor]:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(images, count, 2, generator=generator)
    size = 0.4 * torch.rand(images, count, 2, generator=generator)
    boxes = torch.cat([corner * (1 - size), corner * (1 - size) + size], dim=2)
    return list((boxes * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])).to(device))


def milliseconds(build: Callable, boxes: List[Tensor], sizes: List[Tuple[int, int]]) -> float:
    start = time.perf_counter()
    build(boxes, sizes, STRIDES)
    if boxes[0].is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--rounds", type=int, default=50, help="timings of each; default: 50")
    args = parser.parse_args()
    sizes = [(HEIGHT // s, WIDTH // s) for s in STRIDES]
    rows = []
    for images, count in ((2, 7), (16, 7), (16, 60)):
        boxes = random_boxes(images, count, args.device)
        for ours, loops in zip(
            object_masks(boxes, sizes, STRIDES), loop_masks(boxes, sizes, STRIDES)
        ):
            assert torch.equal(ours, loops), "the two disagree"
        builds = {"tensors": object_masks, "loop": loop_masks}
        times = {name: [] for name in builds}
        for _ in range(args.rounds):
            for name, build in builds.items():
                times[name].append(milliseconds(build, boxes, sizes))
        tensors, loop = (statistics.median(times[name]) for name in builds)
        rows.append(
            [f"{images} x {count}", f"{tensors:.2f}", f"{loop:.2f}", f"{loop / tensors:.1f}"]
        )
    print(
        f"{args.device}, {torch.get_num_threads()} threads, {HEIGHT} x {WIDTH}, {len(sizes)} levels"
    )
    headers = ["images x boxes", "tensors (ms)", "loop (ms)", "loop / tensors"]
    print(tabulate(rows, headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Writes the bare weights of a checkpoint: without optimizer, adapters and counters.

python tools/export.py output/run/model_final.pth student.pth [--half]
"""

import argparse
import os

import torch
from detectron2.utils.file_io import PathManager


def export(source: str, target: str, half: bool = False) -> None:
    """
    Args:
        source: a checkpoint with a "model" entry.
        target: the file to write; must not exist.
        half: store floating-point numbers in 16 bits. Detectron2 reads them into 32 again.
    """
    checkpoint = torch.load(PathManager.get_local_path(source), map_location="cpu")
    model = checkpoint["model"]
    if half:
        model = {k: v.half() if v.is_floating_point() else v for k, v in model.items()}
    torch.save({"model": model}, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a checkpoint of Detectron2 or d2kd")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--half", action="store_true", help="16-bit numbers: half the size")
    args = parser.parse_args()
    if not PathManager.isfile(args.source):
        parser.exit(1, f"error: {args.source}: no such file\n")
    if os.path.exists(args.target):
        parser.exit(1, f"error: {args.target} exists: remove it or give another name\n")
    export(args.source, args.target, args.half)
    print(f"{args.target}: {os.path.getsize(args.target) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

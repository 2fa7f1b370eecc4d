"""Writes a trained student as ONNX, TorchScript or bare weights, for use without d2kd.

examples:
  d2kd export output/run
  d2kd export output/run --format torchscript --device cuda --output student.ts
  d2kd export output/run --raw-heads --fixed-size 480 640 --half
  d2kd export output/run --format weights --output student.pth

Cascade R-CNN goes into ONNX, not into TorchScript; keypoint detectors into bare weights alone.
The program is compared with the student on images of several sizes before it is written.
What it expects and returns stands in the file, see docs/export.md.
"""

import argparse
import os

from d2kd.engine.trained_run import open_run
from d2kd.export import FORMATS, ExportOptions, export_student
from d2kd.export.trial_images import Size
from d2kd.prediction import image_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its checkpoint")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    parser.add_argument(
        "--output", metavar="FILE", help="must not exist (default: RUN/student with its ending)"
    )
    parser.add_argument(
        "--raw-heads",
        action="store_true",
        help="ONNX of a dense detector up to its heads, and beside it their decoder in NumPy",
    )
    parser.add_argument("--half", action="store_true", help="networks and weights in 16 bits")
    parser.add_argument(
        "--fixed-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="ONNX for images of one size, in pixels (default: of any)",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="images to compare on, files or folders (default: of the validation set)",
    )
    parser.add_argument(
        "--device", default="cpu", help="on which a TorchScript program will run (default: cpu)"
    )


def run(args: argparse.Namespace) -> None:
    run = open_run(args.run)
    path = args.output or os.path.join(run.folder, "student" + FORMATS[args.format])
    options = ExportOptions(
        format=args.format,
        raw_heads=args.raw_heads,
        half=args.half,
        fixed_size=Size(*args.fixed_size) if args.fixed_size else None,
        device=args.device,
    )
    exported = export_student(run, path, options, image_files(args.images))
    if exported.parity:
        print(f"compared with the student: {exported.parity.summary()}")
        if not exported.parity.detections:
            print("it finds nothing there, which proves little: give --images with objects")
    for path in exported.paths:
        print(f"{path}: {os.path.getsize(path) / 1e6:.2f} MB")
    print(f"made in {exported.seconds:.1f} s")

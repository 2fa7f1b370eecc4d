"""Size, speed and accuracy of a student, beside its teacher and a plain student.

examples:
  d2kd analyze output/shapes/frs/fcos_tiny
  d2kd analyze output/distilled --plain output/alone --evaluate --json analysis.json

Prints parameters, size on disk, FLOPs (Detectron2's counter), latency and AP, and the share of the
gap between teacher and plain student that distillation closed. AP is what training wrote; with
--evaluate, what it did not (the teacher's, for instance) is found by evaluating.
"""

import argparse
import json

from d2kd.analysis import analyze
from d2kd.engine.trained_run import open_run
from d2kd.errors import UserError
from d2kd.writing import atomic_write, refuse_existing

from .arguments import add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its checkpoint")
    parser.add_argument("--plain", metavar="RUN", help="run of the student that learned alone")
    parser.add_argument("--evaluate", action="store_true", help="find AP that is not known yet")
    parser.add_argument(
        "--repeats", type=int, default=50, help="timed passes of each detector (default: 50)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write it here; must not exist")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}: give 1 or more")
    if args.json:
        refuse_existing(args.json, "--json")
    plain = open_run(args.plain) if args.plain else None
    analysis = analyze(open_run(args.run), plain, args.evaluate, args.repeats, args.device)
    print(analysis.table())
    if args.json:
        with atomic_write(args.json) as f:
            json.dump(analysis.as_dict(), f, indent=1)

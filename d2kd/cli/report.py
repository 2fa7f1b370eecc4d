"""Writes a page about one or more runs: one HTML file that opens without a network.

examples:
  d2kd report output/shapes/frs/fcos_tiny
  d2kd report output/shapes/frs/fcos_tiny --baseline output/shapes/baselines/fcos_tiny
  d2kd report output/frs output/crosskd --baseline output/plain --output report.html
"""

import argparse
import os

from d2kd.engine.trained_run import open_run
from d2kd.report import write_report
from d2kd.report.page import REPORT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs and the file."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, or one of its checkpoints"
    )
    parser.add_argument("--baseline", metavar="RUN", help="the run to compare with")
    parser.add_argument(
        "--output", metavar="FILE", help=f"default: {REPORT} in the folder of the first run"
    )


def run(args: argparse.Namespace) -> None:
    runs = [open_run(path) for path in args.runs]
    baseline = open_run(args.baseline) if args.baseline else None
    path = args.output or os.path.join(runs[0].folder, REPORT)
    replaced = os.path.exists(path)
    write_report(runs, baseline, path)
    print(f"{path}{', an older report, is replaced' if replaced else ''}")

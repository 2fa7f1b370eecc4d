"""Lists methods, recipes or teachers.

More words keep only the lines with all of them. Teachers are configs whose weights are
published, come with d2kd, are in output/ already, or are to be trained first.

examples:
  d2kd list
  d2kd list recipes gfl R_101 --method CrossKD
  d2kd list teachers mmdet
"""

import argparse

from d2kd.catalogue import KINDS, listing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind", nargs="?", choices=tuple(KINDS), default="methods", help="default: methods"
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="only lines that have it")
    parser.add_argument("--method", default="", metavar="NAME", help="only what is used with it")


def run(args: argparse.Namespace) -> None:
    print(listing(args.kind, args.method, args.words))

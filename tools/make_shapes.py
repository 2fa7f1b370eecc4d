#!/usr/bin/env python
"""Draw one of the embedded data sets now, instead of at first use.

python tools/make_shapes.py shapes_tiny [--output DIR] [--seed N]
"""

import argparse
import logging
import os
import sys

from d2kd.data.builtin import datasets_root
from d2kd.data.shapes import SPECS
from d2kd.data.shapes_files import prepare_shapes
from d2kd.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw an embedded data set in COCO format.")
    parser.add_argument("name", choices=sorted(SPECS))
    parser.add_argument(
        "--output",
        help="folder of the data set (default: where d2kd looks for it)",
    )
    parser.add_argument("--seed", type=int, help="of the drawing (default: 0)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = args.output or os.path.join(datasets_root(), args.name)
    try:
        prepare_shapes(SPECS[args.name], folder, args.seed)
    except UserError as error:
        sys.exit(f"make_shapes: {error}")
    print(f"{args.name} is in {folder}")


if __name__ == "__main__":
    main()

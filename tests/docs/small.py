"""The command ``d2kd`` with an embedded data set of a few images, and runs of two steps:
``python tests/docs/small.py WORDS…``"""

import dataclasses
import sys

from d2kd.cli.main import main
from d2kd.data.shapes import SPECS

SHORT = ["SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.IMS_PER_BATCH", "2"]
FEW = {"train": 24, "val": 6}

if __name__ == "__main__":
    # Before a command is chosen, which registers the data sets
    SPECS["shapes_tiny"] = dataclasses.replace(SPECS["shapes_tiny"], images=FEW)
    words = sys.argv[1:]
    main([*words, *SHORT] if words[0] == "train" else words)

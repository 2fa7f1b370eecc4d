"""The command ``d2kd`` with an embedded data set of a few images, and runs of two steps:
``python tests/docs/small.py WORDS…``, or a script with them: ``… small.py SCRIPT.py WORDS…``"""

import dataclasses
import runpy
import sys

from d2kd.cli.main import main
from d2kd.data.shapes import SPECS

SHORT = ["SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.IMS_PER_BATCH", "2"]
FEW = {"train": 24, "val": 6}

if __name__ == "__main__":
    # Before a command is chosen, which registers the data sets
    SPECS["shapes_tiny"] = dataclasses.replace(SPECS["shapes_tiny"], images=FEW)
    words = sys.argv[1:]
    if words[0].endswith(".py"):
        sys.argv = words
        sys.path.insert(0, "")  # where the script is
        runpy.run_path(words[0], run_name="__main__")
    else:
        main([*words, *SHORT] if words[0] == "train" else words)

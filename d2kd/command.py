"""The command line that trains in a process of its own."""

import os
import sys
from typing import List, Optional

_script: Optional[str] = None


def use_script(path: str) -> None:
    """From now on :func:`train_command` is that script instead of ``python -m d2kd``.

    Args:
        path: a script that imports the user's own methods, backbones or detectors and calls
            :func:`d2kd.cli.main.main`.
    """
    global _script
    _script = os.path.abspath(path)


def train_command() -> List[str]:
    """The words that stand in front of the options of ``d2kd train``."""
    return [sys.executable, *([_script] if _script else ["-m", "d2kd"]), "train"]

"""The command line that trains in a process of its own, and how a user starts d2kd."""

import os
import sys
from typing import List, Optional

_script: Optional[str] = None
# Programs of d2kd itself, for which there is the command d2kd
_OURS = ("__main__.py", "train_net.py")


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


def typed_command() -> List[str]:
    """The words with which a user starts d2kd, for commands that are shown: ``d2kd``, or a script
    of the user's own. The same in every process of a run."""
    program = sys.argv[0]
    is_script = program.endswith(".py") and os.path.basename(program) not in _OURS
    return ["python", program] if is_script else ["d2kd"]

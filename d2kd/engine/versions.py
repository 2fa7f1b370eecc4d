"""What a run was made with: versions and the commit, kept in its folder."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from typing import Any, Dict, List

import detectron2
import torch
import torchvision
from detectron2.utils import comm

import d2kd
from d2kd.writing import atomic_write

VERSIONS = "versions.json"
_GIT_SECONDS = 10


def record_versions(folder: str) -> None:
    """Adds a start of the run, with what it was started with, to ``versions.json``, on the main
    process."""
    if comm.is_main_process():
        starts = [*recorded_versions(folder), _now()]
        with atomic_write(os.path.join(folder, VERSIONS)) as f:
            json.dump(starts, f, indent=2)


def recorded_versions(folder: str) -> List[Dict[str, Any]]:
    """Every start of a run, the first one first; none of a run of before 0.2, or if the file is
    damaged."""
    try:
        with open(os.path.join(folder, VERSIONS)) as f:
            starts = json.load(f)
    except (OSError, ValueError, RecursionError):
        return []
    return [x for x in starts if isinstance(x, dict)] if isinstance(starts, list) else []


def _now() -> Dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "processes": comm.get_world_size(),
        "d2kd": d2kd.__version__,
        "commit": commit_of(os.path.dirname(os.path.dirname(os.path.abspath(d2kd.__file__)))),
        "detectron2": detectron2.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def processor_name() -> str:
    """As Linux names it, elsewhere its architecture."""
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def commit_of(folder: str) -> str:
    """The commit that is checked out in a folder, and whether files differ from it; "" where the
    folder is no checkout of its own."""
    if not os.path.exists(os.path.join(folder, ".git")):
        return ""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + (", changed" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: str, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", folder, *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_SECONDS,
    ).stdout.strip()

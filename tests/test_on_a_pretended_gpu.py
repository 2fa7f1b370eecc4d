"""What runs on a CPU runs on a GPU: nothing is left on the wrong device."""

import subprocess
import sys
from pathlib import Path

import pytest
from pretended_gpu import AVAILABLE
from small_run import FRS, SMALL, environment

from d2kd.methods import DISTILLER_REGISTRY

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch cannot pretend a device")
SCRIPT = Path(__file__).with_name("on_a_pretended_gpu.py")


def run(*arguments):
    command = [sys.executable, "-W", "ignore", SCRIPT, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("method", [name for name, _ in DISTILLER_REGISTRY])
def test_a_step_is_that_of_a_cpu(method):
    found = run("step", method)
    assert found.returncode == 0, found.stderr[-2000:]
    pairs = found.stdout.split()
    assert pairs and all(line.startswith(f"{method}-") for line in pairs)


def test_a_run_and_its_resumption(tmp_path):
    """With evaluations, checkpoints, and batches of several steps."""
    opts = {**SMALL, "TEST.EVAL_PERIOD": "3", "SOLVER.ACCUMULATION_STEPS": "2"}
    pairs = [word for pair in opts.items() for word in pair]
    for end in ("3", "6"):
        arguments = ["--config-file", FRS, "--force-resume", *pairs, "SOLVER.MAX_ITER", end]
        arguments += ["OUTPUT_DIR", str(tmp_path / "run")]
        found = run("train", tmp_path / "data", *arguments)
        assert found.returncode == 0, found.stderr[-2000:]
    assert (tmp_path / "run/model_0000005.pth").exists()


def test_what_mixes_devices_fails():
    found = run("mix")
    assert found.returncode == 0, found.stderr[-2000:]

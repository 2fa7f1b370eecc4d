"""Runs of a comparison at a time: cores and GPUs that they share, and how they end together."""

import os
import signal
import sys
import threading
import time

import pytest

from d2kd.errors import UserError
from d2kd.evidence import runs
from d2kd.evidence.rows import read_rows
from d2kd.evidence.runs import train_rows
from d2kd.one_line import exit_on_user_error

RECIPE = "shapes/frs/fcos_tiny.yaml"


# Stands in for training. It waits for a second one that runs beside it, and notes how many there
# are; with seed 7 it fails, and then others wait until that has been noticed.
_WORKER = """
import os, sys, time
words = dict(zip(sys.argv[-4::2], sys.argv[-3::2]))
folder, seed = words["OUTPUT_DIR"], words["SEED"]
os.makedirs(folder)
open(f"begun {seed}", "w").write(str(os.getpid()))

def names(kind):
    return [x for x in os.listdir() if x.startswith(kind)]

def alive(pid):
    try:
        os.kill(pid, 0)
        return True
    except OSError:
        return False

open(f"{folder}/beside", "w").write(str(len(names("begun")) - len(names("ended"))))
while len(names("begun")) < 2:
    time.sleep(0.01)
if seed == "7":
    sys.exit("error: seed 7 is unlucky")
while os.path.exists("begun 7") and alive(int(open("begun 7").read() or 0)):
    time.sleep(0.01)
line = ", ".join(f'"bbox/{k}": {seed}.0' for k in ("AP", "AP50", "AP75"))
open(f"{folder}/metrics.json", "w").write(f'{{{line}, "iteration": 750}}\\n')
open(f"{folder}/threads", "w").write(str(os.environ.get("OMP_NUM_THREADS")))
open(f"ended {seed}", "w")
"""


@pytest.fixture
def worker(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runs, "train_command", lambda: [sys.executable, "-c", _WORKER])
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 4)
    return tmp_path


@pytest.mark.parametrize("terminal", [True, False])
def test_runs_at_a_time_share_the_cores(worker, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    row = read_rows(RECIPE)[0]
    found = train_rows([(row, seed) for seed in (3, 1, 2)], "out", jobs=2)
    assert [run.results["AP"] for run in found] == [3.0, 1.0, 2.0]
    said = capsys.readouterr().err
    assert ("| 2250/2250 [" in said) == terminal  # with the line of the last evaluation
    assert "shapes/frs/fcos_tiny, seed 3: 3.0 AP in 0.0 min\n" in said
    assert terminal or said.count("\n") == 3
    for run in found:
        assert (worker / run.folder / "threads").read_text() == "2"
        assert int((worker / run.folder / "beside").read_text()) <= 2


def test_processes_take_turns_in_the_gpus(monkeypatch):
    monkeypatch.setattr(runs.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    devices = [runs._environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert devices == ["4", "6", "4"]
    assert runs._environment(0, 1)["CUDA_VISIBLE_DEVICES"] == "4,6"  # one run: as it was


def test_a_run_that_fails_ends_a_comparison_when_those_beside_it_are_done(worker, capsys):
    row = read_rows(RECIPE)[0]
    tasks = [(row, seed) for seed in (7, 1, 2)]
    with pytest.raises(UserError, match="seed 7 failed: seed 7 is unlucky"):
        train_rows(tasks, "out", jobs=2)
    assert (worker / "ended 1").exists() and not (worker / "begun 2").exists()
    (worker / "ended 1").unlink()
    assert train_rows(tasks[1:2], "out")[0].results["AP"] == 1.0
    assert not (worker / "ended 1").exists()  # the run was there, and is not repeated


def test_sigterm_ends_the_runs_before_it_ends_the_comparison(worker):
    row = read_rows(RECIPE)[0]
    (worker / "begun 7").write_text(str(os.getpid()))  # the runs wait for it, which lives on

    def terminate():
        while not (worker / "begun 2").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(SystemExit) as stop, exit_on_user_error(debug=False):
        train_rows([(row, seed) for seed in (1, 2)], "out", jobs=2)
    assert stop.value.code == 143 and not list(worker.glob("ended *"))
    for seed in (1, 2):
        with pytest.raises(OSError, match="No such process"):
            os.kill(int((worker / f"begun {seed}").read_text()), 0)

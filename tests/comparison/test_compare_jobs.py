"""Runs of a comparison at a time: cores and GPUs that they share, and how they end together."""

import os
import signal
import sys
import threading
import time

import pytest

from d2kd.cli.main import main
from d2kd.comparison import runs, tables
from d2kd.comparison.cells import read_cells
from d2kd.comparison.rows import read_rows
from d2kd.comparison.runs import Outcome, Run, train_rows
from d2kd.one_line import exit_on_user_error

RECIPE = "shapes/frs/fcos_tiny.yaml"


# Stands in for training. It waits for a second one that runs beside it, and notes how many there
# are; with seed 7 it fails, and then others wait until that has been noticed.
_WORKER = """
import os, sys, time
words = dict(zip(sys.argv[-4::2], sys.argv[-3::2]))
folder, seed = words["OUTPUT_DIR"], words["SEED"]
os.makedirs(folder, exist_ok=True)
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
    found = train_rows([(row, seed) for seed in (3, 1, 2)], "out", jobs=2).runs
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


def test_a_run_that_fails_leaves_the_others_and_is_named_at_the_end(worker, capsys):
    words = ["compare", RECIPE, "--seeds", "7", "1", "2", "--output", "out", "--jobs", "2"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.err.splitlines()[-1] == (
        "error: 1 of 3 runs failed: shapes/frs/fcos_tiny, seed 7: seed 7 is unlucky; "
        "the same command trains those again, and no others"
    )
    assert "| 1.5 ± 0.7 " in said.out and (worker / "out/table.md").read_text() in said.out
    assert [cell.seed for cell in read_cells(str(worker / "out/cells.json"))] == [1, 2]
    for seed in (1, 2):
        (worker / f"ended {seed}").unlink()
    with pytest.raises(SystemExit):
        main(words)
    assert not list(worker.glob("ended *"))  # these runs were there, and are not repeated


def test_without_the_baseline_there_is_a_table_without_gains(worker, capsys, monkeypatch):
    monkeypatch.setattr(tables, "train_rows", _first_fails)
    rows = [row._replace(label=label) for row in read_rows(RECIPE) for label in "abc"]
    text, problem = tables.compare(rows, [1, 2], "out", [])
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == ["b", "c"]
    assert "gain over a" in text and "+" not in text and problem == "3 of 6 runs failed: x: why"
    assert (worker / "out/figure.png").stat().st_size > 1000


def _first_fails(tasks, output, opts, jobs):
    """Row a with every seed, and row b with the first one."""
    good = Run(output, dict.fromkeys(("AP", "AP50", "AP75"), 5.0), 1.0)
    bad = [row.label == "a" or (row.label, seed) == ("b", 1) for row, seed in tasks]
    return Outcome([None if x else good for x in bad], {"why": ["x"]})


def test_nothing_is_written_where_every_run_fails(worker, monkeypatch):
    monkeypatch.setattr(runs, "train_command", lambda: [sys.executable, "-c", "exit('no')"])
    assert tables.compare(read_rows(RECIPE), [1], "out", []) == (
        "",
        "1 of 1 runs failed: shapes/frs/fcos_tiny, seed 1: no",
    )
    assert not (worker / "out/table.md").exists()


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

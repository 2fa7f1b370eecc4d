"""The fault suite, ``make faults``: every promise of docs/robustness.md is tried, with figures at
the end. Less than half an hour on two cores."""

import argparse
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "engine")]
os.environ["OMP_NUM_THREADS"] = "1"  # also where the runs are forked

import pytest  # noqa: E402
import torch  # noqa: E402
from damage import run_damage  # noqa: E402
from disks import run_disks  # noqa: E402
from kills import run_kills  # noqa: E402
from small_run import TOY, TWO, start  # noqa: E402
from test_processes import processes_of, wait_for  # noqa: E402

from d2kd.data.builtin import register_shapes  # noqa: E402

# The rows of the page: malicious configs, refusals, NaN and infinite values, signals, processes
TESTS = ("test_safe_yaml.py", "data/test_bad_images.py", "checkpoint/test_files.py") + tuple(
    f"engine/test_{name}.py" for name in ("start", "resume", "finite", "stopping", "processes")
)


def run_tests():
    paths = [str(HERE.parent / name) for name in TESTS]
    several_too = ["-m", "not docs"]  # runs of several processes, which make test leaves out
    status = pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *several_too, *paths])
    return f"the tests of {len(paths)} files", [] if status == 0 else ["tests failed"]


def run_hanging_rank(folder):
    opts = ["SOLVER.MAX_ITER", 100000, "RUN.TIMEOUT", 20]
    process = start(folder / "data", folder / "run", *opts, flags=TWO)
    wait_for(folder / "run" / "model_0000002.pth", process)
    begin = time.monotonic()
    os.kill(processes_of(process)[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=600)
    seconds, status = time.monotonic() - begin, process.returncode
    fine = status and "does not answer" in err
    wrong = [] if fine else [f"a hanging rank: status {status}\n{err[-1500:]}"]
    return f"a rank that hangs ended the run after {seconds:.0f} s (timeout 20 s)", wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=110)  # some come too late
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    all_wrong, table = [], []
    with tempfile.TemporaryDirectory() as name:
        folders = {n: Path(name) / n for n in ("data", "kills", "disks", "damage", "rank")}
        for folder in folders.values():
            folder.mkdir()
        register_shapes(TOY, str(folders["data"]))
        dataset = ("toy_train", "toy_val")
        parts = {
            "kills": lambda: run_kills(folders["kills"], dataset, args.kills, args.seed),
            "disks": lambda: run_disks(folders["disks"], dataset, args.disks, args.seed),
            "damage": lambda: run_damage(folders["damage"], 50, 200, args.seed),
            "rank": lambda: run_hanging_rank(folders["rank"]),
            "tests": run_tests,
        }
        for part, run in parts.items():
            begin = time.monotonic()
            figures, wrong = run()
            seconds = time.monotonic() - begin
            table.append(f"{part:7} {seconds:5.0f} s  {len(wrong)} wrong  {figures}")
            print(table[-1], *wrong, sep="\n", flush=True)
            all_wrong += wrong
    print("", *table, sep="\n")
    sys.exit(bool(all_wrong))


if __name__ == "__main__":
    main()

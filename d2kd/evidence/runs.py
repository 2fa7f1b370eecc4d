"""Training the rows of a comparison, each run in a process of its own."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, NamedTuple, Sequence, TextIO

from tqdm import tqdm

from d2kd.checkpoint import written_whole
from d2kd.config import read_config
from d2kd.engine.metrics import METRICS as METRICS_JSON
from d2kd.engine.run_config import config_file
from d2kd.errors import UserError
from d2kd.lazy import python_overrides
from d2kd.model_zoo import config_name

from .rows import Row, folder_of

METRICS = ("AP", "AP50", "AP75")
SUMMARY = "summary.json"
_TRAIN = [sys.executable, "-m", "d2kd", "train"]
_LAST_LINES = 30  # of a run that failed


class Run(NamedTuple):
    """A finished run."""

    folder: str
    results: Dict[str, float]  # of the last evaluation
    seconds: float  # of training, evaluations included; 0 if it was not trained here


def opts_of(row: Row, seed: int, output: str, opts: Sequence[str] = ()) -> List[str]:
    """All overrides of a run, in the syntax of its config."""
    own = ["SEED", str(seed), "OUTPUT_DIR", _folder(row, seed, output)]
    return python_overrides(row.config, [*row.opts, *opts, *own])


def _folder(row: Row, seed: int, output: str) -> str:
    return os.path.join(output, f"{folder_of(row)}_seed{seed}")


def command(row: Row, seed: int, output: str, opts: Sequence[str] = ()) -> str:
    """The command line that trains a row, from the current folder."""
    words = ["d2kd", "train", "--config-file", config_name(row.config)]
    return shlex.join([*words, *opts_of(row, seed, output, opts)])


def train_row(row: Row, seed: int, output: str, opts: Sequence[str] = ()) -> Run:
    """Trains a row in a process of its own, unless its folder holds the finished run; one that was
    interrupted goes on.

    Args:
        row: the row.
        seed: ``SEED`` of the run.
        output: folder for the runs; this one goes to ``<output>/<folder of the row>_seed<seed>``.
        opts: overrides, KEY VALUE ...

    Raises:
        UserError: if the folder holds a run with another config, or training fails.
    """
    opts = opts_of(row, seed, output, opts)
    folder, label = _folder(row, seed, output), f"{row.label}, seed {seed}"
    cfg = read_config(row.config, opts)
    name, text = config_file(cfg)
    saved = os.path.join(folder, name)
    if os.path.isfile(saved):
        with open(saved) as f:
            if f.read() != text:
                raise UserError(
                    f"{folder} holds a run with another config: remove it, or give another --output"
                )
    summary = os.path.join(folder, SUMMARY)
    if not os.path.isfile(summary):
        seconds = _train(row.config, opts, label, folder, cfg.SOLVER.MAX_ITER)
        results = {m: [*scalars(folder, f"bbox/{m}").values()][-1] for m in METRICS}
        with written_whole(summary) as f:
            json.dump({"seconds": seconds, "results": results}, f)
    with open(summary) as f:
        return Run(folder, **json.load(f))


def _train(path: str, opts: Sequence[str], label: str, folder: str, max_iter: int) -> float:
    words = [*_TRAIN, "--config-file", path, "--resume", *opts]
    bar_format = "{desc}: {percentage:3.0f}% |{bar}| {n}/{total} [{elapsed} < {remaining}]"
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        with tqdm(total=max_iter, desc=f"train {label}", bar_format=bar_format) as bar:
            _wait(process, folder, bar)
        if process.returncode:
            raise UserError(f"training {label} failed: {_last_lines(output)}")
    return time.perf_counter() - start


def _wait(process: subprocess.Popen, folder: str, bar: tqdm) -> None:
    """Until the process ends; meanwhile the bar follows the metrics that it writes."""
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            bar.update(max(steps_done(folder) - bar.n, 0))
    except KeyboardInterrupt:  # Ctrl-C is for the process, too: it saves what it has
        process.wait()
        raise


def _last_lines(output: TextIO) -> str:
    """Shows the end of what a process said, and returns its last line."""
    output.seek(0)
    *before, last = output.read().splitlines()[-_LAST_LINES:] or ["it said nothing"]
    print("\n".join(before), file=sys.stderr)
    return last[len("error: ") :] if last.startswith("error: ") else last


def steps_done(folder: str) -> int:
    """Steps of training that a run's metrics tell of."""
    path = os.path.join(folder, METRICS_JSON)
    return max(scalars(folder, "iteration"), default=-1) + 1 if os.path.isfile(path) else 0


def scalars(folder: str, key: str) -> Dict[int, float]:
    """A scalar of a run by iteration, from its ``metrics.json``; a line that is being written does
    not count."""
    with open(os.path.join(folder, METRICS_JSON)) as f:
        rows = [json.loads(line) for line in f if line.endswith("\n")]
    return {row["iteration"]: row[key] for row in rows if key in row}

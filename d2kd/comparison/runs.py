"""Training the rows of a comparison, each run in a process of its own, several at once."""

import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import deque
from typing import Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from tqdm import tqdm

from d2kd.command import train_command, typed_command
from d2kd.config import read_config
from d2kd.distillation import distilled_methods, refuse_missing_weights, teacher_on_meta
from d2kd.engine.metrics import newest_line, read_metrics
from d2kd.engine.results import METRICS
from d2kd.engine.run_config import MAX_NAMED, changed_settings
from d2kd.errors import UserError, first_of, reason
from d2kd.lazy import python_overrides
from d2kd.model_zoo import FINAL_WEIGHTS, config_name
from d2kd.writing import atomic_write

from .rows import Row, folder_of

SUMMARY = "summary.json"
_LAST_LINES = 30  # of a run that failed
_POLL_SECONDS = 1.0


class Run(NamedTuple):
    """A finished run."""

    folder: str
    results: Dict[str, float]  # of the last evaluation
    # Of training, evaluations included; 0 if it was not trained here, None if in several parts
    seconds: Optional[float]


def opts_of(row: Row, seed: int, output: str, opts: Sequence[str] = ()) -> List[str]:
    """All overrides of a run, in the syntax of its config."""
    own = ["SEED", str(seed), "OUTPUT_DIR", _folder(row, seed, output)]
    return python_overrides(row.config, [*row.opts, *opts, *own])


def _folder(row: Row, seed: int, output: str) -> str:
    return os.path.join(output, f"{folder_of(row)}_seed{seed}")


def command(row: Row, seed: int, output: str, opts: Sequence[str] = ()) -> str:
    """The command line that trains a row, from the current folder."""
    words = [*typed_command(), "train", "--config-file", config_name(row.config)]
    return shlex.join([*words, *opts_of(row, seed, output, opts)])


class Outcome(NamedTuple):
    """What came of the runs of a comparison."""

    runs: List[Optional[Run]]  # in the order of the tasks; None if it failed
    failures: Dict[str, List[str]]  # names of the runs that failed, by the reason

    def problem(self) -> str:
        """Which runs failed and why, in a line; empty if none did."""
        if not self.failures:
            return ""
        named = "; ".join(f"{' and '.join(x)}: {why}" for why, x in self.failures.items())
        return f"{self.runs.count(None)} of {len(self.runs)} runs failed: {named}"


def train_rows(
    tasks: Sequence[Tuple[Row, int]], output: str, opts: Sequence[str] = (), jobs: int = 1
) -> Outcome:
    """Trains rows in processes of their own. Runs whose folder says that they are finished are not
    repeated, interrupted ones go on, and one that fails does not keep others from being trained.
    Each says its AP when it is done; a bar shows the progress of all together and the time left,
    where a terminal shows it.

    Args:
        tasks: rows, each with the ``SEED`` of the run.
        output: folder for the runs; each goes to ``<output>/<folder of the row>_seed<seed>``.
        opts: overrides of all of them, KEY VALUE ...
        jobs: how many are trained at a time. They share the cores of the machine between them, and
            take turns in its GPUs.

    Raises:
        UserError: if a folder holds a run with another config, or a teacher has no weights, before
            anything is trained.
    """
    trainings = [_Training(row, seed, output, opts) for row, seed in tasks]
    # Two tables may have the same plain student: it is trained once
    waiting = deque({x.folder: x for x in trainings if not x.is_finished()}.values())
    _refuse_missing_teachers({folder_of(x.row): x for x in waiting}.values())
    failed = _train_all(waiting, len(trainings), jobs) if waiting else {}
    runs: List[Optional[Run]] = []
    failures: Dict[str, List[str]] = {}
    for training in trainings:
        try:
            if training.folder in failed:
                raise failed[training.folder]
            runs.append(training.run())
        except UserError as error:
            runs.append(None)
            failures.setdefault(str(error), []).append(training.name)
    return Outcome(runs, failures)


def _refuse_missing_teachers(trainings: "Iterable[_Training]") -> None:
    """
    Raises:
        UserError: if any of them distils from a teacher without weights; it names all of them.
    """
    rows: Dict[str, List[str]] = {}  # labels by what is wrong
    for training in trainings:
        problem = training.missing_teacher()
        if problem:
            rows.setdefault(problem, []).append(repr(training.row.label))
    if rows:
        named = [
            f"{'rows' if len(labels) > 1 else 'row'} {', '.join(labels)}: {problem}"
            for problem, labels in rows.items()
        ]
        raise UserError("; ".join(named))


def _train_all(waiting: "Deque[_Training]", of_all: int, jobs: int) -> Dict[str, UserError]:
    """Trains at most ``jobs`` at a time, and returns why which failed, by folder."""
    running: List[Optional[_Training]] = [None] * jobs
    total = sum(x.steps_left() for x in waiting)
    bar_format = "{desc}{percentage:3.0f}% |{bar}| {n}/{total} [{elapsed} < {remaining}]"
    failed: Dict[str, UserError] = {}
    bar = tqdm(total=total, bar_format=bar_format, disable=None)  # None: unless it is a terminal
    with bar, _stopped_together(running):
        while any(running) or waiting:
            for slot, training in enumerate(running):
                if training is None and waiting:
                    begins = waiting.popleft()
                    begins.start(_environment(slot, jobs))
                    running[slot] = begins
            now = [x for x in running if x is not None]
            begun = of_all - len(waiting) - len(now) + 1
            bar.set_description(f"run {begun} of {of_all}, {'; '.join(x.name for x in now)}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                now[0].process.wait(timeout=_POLL_SECONDS)
            bar.update(sum(x.new_steps() for x in now))
            for slot, training in enumerate(running):
                if training is not None and training.has_ended():
                    running[slot] = None
                    try:
                        bar.write(training.finish(), file=sys.stderr)
                    except UserError as error:
                        failed[training.folder] = error
                        bar.total -= training.steps_left()
                        bar.write(f"{training.name} failed: {error}", file=sys.stderr)
    return failed


@contextlib.contextmanager
def _stopped_together(running: "Sequence[Optional[_Training]]") -> Iterator[None]:
    """When this process is asked to stop, the running ones save what they have, and end first."""
    try:
        yield
    except KeyboardInterrupt:
        processes = [x.process for x in running if x is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise


def _environment(slot: int, jobs: int) -> Dict[str, str]:
    """That of a process in one of several places: threads and GPUs are shared out."""
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
        gpus = torch.cuda.device_count()
        if gpus > 1:
            visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    return environment


class _Training:
    """A run of a row, before, while and after it is trained."""

    process: subprocess.Popen

    def __init__(self, row: Row, seed: int, output: str, opts: Sequence[str]):
        """
        Raises:
            UserError: if the folder holds a run with another config.
        """
        self.row = row
        self.name = f"{row.label}, seed {seed}"
        self.folder = _folder(row, seed, output)
        self._opts = opts_of(row, seed, output, opts)
        self._cfg = cfg = read_config(row.config, self._opts)
        self._max_iter = cfg.SOLVER.MAX_ITER
        changed = changed_settings(cfg, evaluation=True)
        if changed:
            raise UserError(
                f"{self.folder} holds a run with another config: {first_of(changed, MAX_NAMED)}; "
                "remove it, or give another --output"
            )
        self._before = self._done = min(steps_done(self.folder), self._max_iter)

    def missing_teacher(self) -> str:
        """What to do about a teacher without weights; empty if there is none, or it has some."""
        if distilled_methods(self._cfg):
            try:
                refuse_missing_weights(self._cfg, teacher_on_meta(self._cfg).weights)
            except UserError as e:
                return str(e)
        return ""

    def is_finished(self) -> bool:
        """Also of a run that was trained by a command of :func:`command`, on several GPUs say."""
        if self._has(SUMMARY):
            return True
        # The evaluation at the end is logged after the last step
        ended = self._has(FINAL_WEIGHTS) and f"bbox/{METRICS[0]}" in newest_line(self._lines())
        if ended:
            self._summarize(None)
        return ended

    def _has(self, name: str) -> bool:
        return os.path.isfile(os.path.join(self.folder, name))

    def _lines(self) -> List[Dict[str, float]]:
        return read_metrics(self.folder, self._cfg.DATASETS.TEST)

    def steps_left(self) -> int:
        return self._max_iter - self._done

    def start(self, environment: Dict[str, str]) -> None:
        words = [*train_command(), "--config-file", self.row.config, "--resume", *self._opts]
        self._started = time.perf_counter()
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            words,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
        )

    def new_steps(self) -> int:
        """Steps since it was asked last, by the metrics that the process writes. The evaluation
        after the last step is logged as one step more, and does not count."""
        before = self._done
        self._done = min(max(steps_done(self.folder), before), self._max_iter)
        return self._done - before

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def finish(self) -> str:
        """Writes what came out, and returns it in a line.

        Raises:
            UserError: if training failed.
        """
        with self._said:
            if self.process.returncode:
                raise UserError(self._last_line())
        seconds = time.perf_counter() - self._started
        results = self._summarize(None if self._before else seconds)
        return f"{self.name}: {results['AP']:.1f} AP in {seconds / 60:.1f} min"

    def _summarize(self, seconds: Optional[float]) -> Dict[str, float]:
        """Writes the results of the last evaluation, and returns them."""
        last = newest_line(x for x in self._lines() if all(f"bbox/{m}" in x for m in METRICS))
        if not last:
            raise UserError(f"it was not evaluated, {self.folder} has no bbox/AP")
        # Detectron2 has no number for a detector that finds nothing
        values = {m: last[f"bbox/{m}"] for m in METRICS}
        results = {m: 0.0 if math.isnan(value) else value for m, value in values.items()}
        with atomic_write(os.path.join(self.folder, SUMMARY)) as f:
            json.dump({"seconds": seconds, "results": results}, f)
        return results

    def _last_line(self) -> str:
        """Shows the end of what the process said, and returns its last line."""
        self._said.seek(0)
        *before, last = self._said.read().splitlines()[-_LAST_LINES:] or ["it said nothing"]
        print("\n".join(before), file=sys.stderr)
        return last[len("error: ") :] if last.startswith("error: ") else last

    def run(self) -> Run:
        """
        Raises:
            UserError: if what was written of it is damaged.
        """
        path = os.path.join(self.folder, SUMMARY)
        try:
            with open(path, encoding="utf-8") as f:
                content = json.load(f)
            results = {metric: float(content["results"][metric]) for metric in METRICS}
            seconds = content["seconds"]
            return Run(self.folder, results, None if seconds is None else float(seconds))
        except (ValueError, TypeError, LookupError, RecursionError) as e:
            raise UserError(
                f"{path} is damaged ({reason(e)}): remove it, and it is written anew"
            ) from e


def steps_done(folder: str) -> int:
    """Steps of training that a run's metrics tell of."""
    return max(scalars(folder, "iteration"), default=-1) + 1


def scalars(folder: str, key: str) -> Dict[int, float]:
    """A scalar of a run by iteration, from its ``metrics.json``; a line that is being written does
    not count."""
    return {int(row["iteration"]): row[key] for row in read_metrics(folder) if key in row}

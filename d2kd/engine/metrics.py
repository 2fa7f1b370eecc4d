"""Metrics of a run that is resumed: as if it had not been interrupted."""

import contextlib
import json
import math
import os
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter

from d2kd.distillation import LOG_PERIOD

from .progress import WINDOW, ProgressPrinter

METRICS_FILE = "metrics.json"
# Values to keep of each: one at least is from before the last write, if there was one
_KEPT = LOG_PERIOD + WINDOW

# What these end with tells of the process, not of the run
_OF_THE_PROCESS = ("time", "eta_seconds", "max_memory")

# By name: whether it is smoothed, and its last values with their iterations
Scalars = Dict[str, Tuple[bool, List[Tuple[float, int]]]]


def recent_scalars(storage: EventStorage) -> Scalars:
    """What the next writes will need of the metrics so far."""
    hints = storage.smoothing_hints()
    return {
        name: (hints[name], [(float(v), int(i)) for v, i in history.values()[-_KEPT:]])
        for name, history in storage.histories().items()
        if not name.endswith(_OF_THE_PROCESS)
    }


def last_write(iteration: int) -> int:
    """The last iteration before another one in which metrics were written; -1 if in none."""
    return iteration // LOG_PERIOD * LOG_PERIOD - 1


def restore_metrics(
    folder: str,
    iteration: int,
    scalars: Scalars,
    storage: EventStorage,
    writers: Iterable[EventWriter],
) -> None:
    """Puts the metrics back to where they were when a checkpoint was written.

    Args:
        folder: of the run; lines of ``metrics.json`` that come from later steps go.
        iteration: the checkpoint's.
        scalars: from :func:`recent_scalars`.
        storage: empty.
        writers: those of the run; they will not write again what they have written.
    """
    written = last_write(iteration)
    _put(storage, scalars, range(written + 1))
    with _left_as_it_is(os.path.join(folder, METRICS_FILE), written):
        for writer in writers:
            if not isinstance(writer, ProgressPrinter):
                writer.write()  # remembers how far it came
    _put(storage, scalars, range(written + 1, iteration + 1))


@contextlib.contextmanager
def _left_as_it_is(path: str, iteration: int) -> Iterator[None]:
    """Cuts a file of metrics after an iteration, and removes what is written to it inside."""
    if comm.is_main_process():
        forget_lines(path, iteration)
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    yield
    if comm.is_main_process() and os.path.isfile(path):
        os.truncate(path, size)


def _put(storage: EventStorage, scalars: Scalars, iterations: range) -> None:
    now = storage.iter
    for name, (hint, values) in scalars.items():
        for value, iteration in values:
            if iteration in iterations:
                storage.iter = iteration
                storage.put_scalar(name, value, smoothing_hint=hint)
    storage.iter = now


def forget_lines(path: str, iteration: int) -> None:
    """Cuts a file of metrics after the last line of an iteration, a torn line included."""
    if not os.path.isfile(path):
        return
    kept = 0
    with open(path, "rb") as f:
        for line in f:
            if not line.endswith(b"\n") or _iteration(line) > iteration:
                break
            kept += len(line)
    os.truncate(path, kept)


def read_metrics(folder: str, test_sets: Sequence[str] = ()) -> List[Dict[str, float]]:
    """The lines of a run's metrics, each with the scalars of one ``iteration``; none of a run that
    wrote none. What is no number is passed over, and what a process that was killed left of a
    line.

    Args:
        folder: of the run.
        test_sets: its ``DATASETS.TEST``. Of several sets, metrics are called ``<set>/bbox/AP``:
            those of the first are here as ``bbox/AP``, too.
    """
    path = os.path.join(folder, METRICS_FILE)
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as f:
        lines = list(filter(None, map(_scalars, f)))
    if len(test_sets) < 2:
        return lines
    first = f"{test_sets[0]}/"
    return [
        {**line, **{k[len(first) :]: v for k, v in line.items() if k.startswith(first)}}
        for line in lines
    ]


def has_ended(folder: str, max_iter: int) -> bool:
    """Whether the metrics of a run tell of the evaluation after its last step."""
    return any(line["iteration"] == max_iter for line in read_metrics(folder))


def newest_line(lines: Iterable[Dict[str, float]]) -> Dict[str, float]:
    """The line of the highest iteration, which need not be the last one; of a finished run, that of
    the evaluation after the last step."""
    return max(lines, key=lambda line: line["iteration"], default={})


def _iteration(line: bytes) -> float:
    return _scalars(line).get("iteration", math.inf)


def _scalars(line: bytes) -> Dict[str, float]:
    """The numbers in a line; none of a line without an iteration."""
    try:
        content: Any = json.loads(line)
        numbers = {k: v for k, v in content.items() if type(v) in (int, float)}
        return numbers if math.isfinite(numbers["iteration"]) else {}
    except (ValueError, AttributeError, KeyError, OverflowError, RecursionError):
        return {}

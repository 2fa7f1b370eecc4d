"""How long parts of a step take, without making the host wait for the device."""

import contextlib
import time
from typing import Dict, Iterable, Iterator, List, Tuple, Union

import torch

_Moment = Union[float, torch.cuda.Event]


class Stopwatch:
    """The times of named parts of one step. On a GPU these are moments of its own queue of work,
    which are read in :meth:`seconds`, at a time when that work is done."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: Dict[str, List[Tuple[_Moment, _Moment]]] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs inside; a part may run several times. Decorates functions too."""
        start = self._now()
        yield
        self._spans.setdefault(name, []).append((start, self._now()))

    def seconds(self) -> Dict[str, float]:
        """Seconds of every part. Waits for the GPU, if it has not come to the end of them."""
        return {
            name: sum(_seconds_between(*span) for span in spans)
            for name, spans in self._spans.items()
        }

    def _now(self) -> _Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(start: _Moment, end: _Moment) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def mean_seconds(watches: Iterable[Stopwatch]) -> Dict[str, float]:
    """The parts' mean seconds over the steps in which they ran."""
    values: Dict[str, List[float]] = {}
    for watch in watches:
        for name, seconds in watch.seconds().items():
            values.setdefault(name, []).append(seconds)
    return {name: sum(seconds) / len(seconds) for name, seconds in values.items()}

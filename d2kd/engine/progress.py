"""The line that a run prints now and then."""

import datetime
import logging
from typing import Dict, List, Optional

from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

logger = logging.getLogger(__name__)

# Values that a smoothed one is made of, as in Detectron2
WINDOW = 20
# Parts of a step that are logged as <part>_time; what they leave is the student's
TIMED_PARTS = ("data", "teacher", "distillation")


class ProgressPrinter(EventWriter):
    """Prints where training is: the time that is left, the losses, the seconds of a step and what
    they go to, the learning rate and the memory. The time that is left is stored as
    ``eta_seconds``, as by Detectron2's own printer."""

    def __init__(self, max_iter: int):
        """
        Args:
            max_iter: iterations of the run.
        """
        self._max_iter = max_iter

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter >= self._max_iter:  # the last evaluation; there is no progress to tell
            return
        parts = [
            self._eta(storage),
            f"iter: {storage.iter} of {self._max_iter}",
            *_losses(storage),
            _times(storage),
            _latest(storage, "lr", "lr: {:.3g}"),
            _latest(storage, "max_memory", "memory: {:.0f} MiB"),
        ]
        # The first one is not at the start of the line, where tools that follow it look for it.
        logger.info(" " + "  ".join(filter(None, parts)))

    def _eta(self, storage: EventStorage) -> str:
        if "time" not in storage.histories():  # the first steps are not timed
            return ""
        median = storage.history("time").median(1000)
        seconds = median * (self._max_iter - storage.iter - 1)
        storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
        return f"eta: {datetime.timedelta(seconds=int(seconds))}"


def _losses(storage: EventStorage) -> List[str]:
    """The sum, and the losses of the last step without their prefix."""
    names = [name for name, (_, i) in storage.latest().items() if i == storage.iter]
    values = {n: storage.history(n).median(WINDOW) for n in names if "loss" in n}
    total = values.pop("total_loss", None)
    line = [] if total is None else [f"loss: {total:.4g}"]
    terms = [f"{name.replace('loss_', '', 1)} {value:.3g}" for name, value in values.items()]
    return [*line, f"({', '.join(terms)})"] if terms else line


def _times(storage: EventStorage) -> str:
    if "time" not in storage.histories():
        return ""
    seconds = storage.history("time").avg(WINDOW)
    split = split_time(
        seconds,
        {p: _value(storage, f"{p}_time") for p in TIMED_PARTS if f"{p}_time" in storage.latest()},
    )
    return f"time: {seconds:.3f} s ({', '.join(f'{k} {v:.3f}' for k, v in split.items())})"


def _value(storage: EventStorage, name: str) -> float:
    if storage.smoothing_hints()[name]:
        return storage.history(name).avg(WINDOW)
    value, iteration = storage.latest()[name]
    return value if iteration == storage.iter else 0.0  # a part that has ended costs nothing


def split_time(seconds: float, parts: Dict[str, Optional[float]]) -> Dict[str, float]:
    """
    Args:
        seconds: of a step.
        parts: seconds of it that were measured, by name.

    Returns:
        these, and the rest as that of the student: its forward pass, the backward pass of all
        losses and the optimizer's step.
    """
    known = {name: value for name, value in parts.items() if value}
    return {**known, "student": max(seconds - sum(known.values()), 0.0)}


def _latest(storage: EventStorage, name: str, form: str) -> str:
    return form.format(storage.latest()[name][0]) if name in storage.latest() else ""

"""Numbers about a method that are logged beside its losses."""

from typing import Callable, Dict

from detectron2.utils.events import get_event_storage
from torch import Tensor

PERIOD = 20


def log_sometimes(numbers: Callable[[], Dict[str, Tensor]]) -> None:
    """Logs scalars as ``distill/<name>``, every :data:`PERIOD` iterations: reading them makes the
    host wait for the device.

    Args:
        numbers: computes scalars by name; called only when they are logged.
    """
    storage = get_event_storage()
    if (storage.iter + 1) % PERIOD == 0:
        for name, value in numbers().items():
            storage.put_scalar(f"distill/{name}", value.item(), smoothing_hint=False)

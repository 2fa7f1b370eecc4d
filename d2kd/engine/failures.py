"""What a machine does to a run, told in one line."""

import contextlib
import logging
from typing import Iterator, Optional

import torch
import torch.distributed as dist
from detectron2.utils import comm

from d2kd.errors import UserError
from d2kd.writing import DISK_ERRORS, cannot_write

from .stopping import unreachable

# The logger of Detectron2 that shows the traceback of whatever ends a training
_TRAINING = "detectron2.engine.train_loop"
# In what gloo says of a process that it waits for; most of it has the file of its source
_GLOO = ("gloo", "pair closure", "closed by peer", "reset by peer")


@contextlib.contextmanager
def as_user_error(output_dir: str) -> Iterator[None]:
    """Turns what happens to a run from outside into a :class:`UserError`.

    Args:
        output_dir: the run's folder.
    """
    try:
        yield
    except OSError as e:
        if e.errno in DISK_ERRORS:
            raise UserError(cannot_write(output_dir, e)) from e
        raise
    except RuntimeError as e:
        reason = _reason(e)
        if reason is None:
            raise
        raise UserError(reason) from e


def _reason(error: RuntimeError) -> Optional[str]:
    text = str(error)
    if "DataLoader worker" in text:
        return (
            f"a process that loads data ended ({text.split('. ')[0]}; out of memory?): add --resume"
            " to go on from the last checkpoint with more memory, or --force-resume with fewer "
            "DATALOADER.NUM_WORKERS"
        )
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            f"the GPU's memory is full ({text.split('. ')[0]}): lower SOLVER.IMS_PER_BATCH (and "
            "raise SOLVER.ACCUMULATION_STEPS) or INPUT.MAX_SIZE_TRAIN"
        )
    several = comm.get_world_size() > 1
    if several and (isinstance(error, dist.DistError) or any(x in text.lower() for x in _GLOO)):
        return unreachable(error)
    return None


def keep_quiet_of_user_errors() -> None:
    """Detectron2 logs a traceback of whatever ends a training. One line is enough of a
    :class:`UserError`, and of losses that are not finite, which become one."""
    logging.getLogger(_TRAINING).addFilter(_needs_traceback)


def _needs_traceback(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], (UserError, FloatingPointError)))

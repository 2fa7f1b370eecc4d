"""How a command ends when the user can mend what is wrong: with one line, not with a traceback."""

import contextlib
import logging
import signal
import sys
from typing import Callable, Iterator

from d2kd.errors import UserError

# The loggers that write a run's files
LOGGERS = ("fvcore", "detectron2", "d2kd")


def exit_status(signal_number: int) -> int:
    """What a shell shows of a process that a signal ended: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + signal_number


@contextlib.contextmanager
def in_one_line(debug: bool, is_first: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Ends the process with one line and status 1 for a :class:`UserError`, with 130 for Ctrl-C.

    Args:
        debug: let their tracebacks through.
        is_first: asked before the line is printed; False if another process of the run has
            printed one.
    """
    try:
        yield
    except UserError as error:
        if debug:
            raise
        _drop_full_logs()
        if is_first():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        if debug:
            raise
        if is_first():
            print("Stopped before anything was to be saved", file=sys.stderr, flush=True)
        sys.exit(exit_status(signal.SIGINT))


def _drop_full_logs() -> None:
    """A log on a full disk would say so once more at the end of the process."""
    for name in LOGGERS:
        for handler in list(logging.getLogger(name).handlers):
            try:
                handler.flush()
            except OSError:
                logging.getLogger(name).removeHandler(handler)
                with contextlib.suppress(OSError):
                    handler.stream.close()
            except ValueError:  # closed already
                pass

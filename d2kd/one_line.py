"""How a command ends when the user can mend what is wrong: with one line, not with a traceback."""

import contextlib
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Callable, Iterator, Optional

from d2kd.errors import UserError

# The loggers that write a run's files
LOGGERS = ("fvcore", "detectron2", "d2kd")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command in the way of Ctrl-C."""


def exit_status(signal_number: int) -> int:
    """What a shell shows of a process that a signal ended: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + signal_number


@contextlib.contextmanager
def in_one_line(debug: bool, is_first: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Ends the process with one line and status 1 for a :class:`UserError` or a file that cannot be
    used, with 130 for Ctrl-C, with 143 for SIGTERM. (While it trains, a run has its own way to
    stop.)

    Args:
        debug: let their tracebacks through.
        is_first: asked before the line is printed; False if another process of the run has
            printed one.
    """
    try:
        with _sigterm_raised():
            yield
    except (UserError, OSError) as error:
        of_a_file = isinstance(error, OSError) and error.filename is not None
        if debug or not (of_a_file or isinstance(error, UserError)):
            raise
        _drop_full_logs()
        if is_first():
            text = f"{error.filename}: {error.strerror}" if of_a_file else error
            print(f"error: {text}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt as asked:
        if debug:
            raise
        number = signal.SIGTERM if isinstance(asked, Terminated) else signal.SIGINT
        if is_first():
            print(f"Stopped by {number.name}: what was saved stays", file=sys.stderr, flush=True)
        sys.exit(exit_status(number))


@contextlib.contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Inside of it SIGTERM raises :class:`Terminated`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def receive(number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() == owner:
            raise Terminated
        os._exit(exit_status(number))  # a process that this one has forked

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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

"""How a command ends when the user can fix what is wrong: with one line, not with a traceback."""

import contextlib
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Callable, Iterator, Optional, Sequence, Tuple

from d2kd.errors import UserError

# The loggers that write a run's files
LOGGERS = ("fvcore", "detectron2", "d2kd")


class Terminated(KeyboardInterrupt):
    """A signal that ends a command in the way of Ctrl-C.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def stop_signals() -> Tuple[int, ...]:
    """What asks this process to end: SIGTERM, Ctrl-C, and a terminal that closes, unless the
    process was started to ignore that, as by nohup."""
    hung_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hung_up else []))


def exit_status(signal_number: int) -> int:
    """What a shell shows of a process that a signal ended: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + signal_number


@contextlib.contextmanager
def exit_on_user_error(debug: bool, is_first: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Ends the process with one line and status 1 for a :class:`UserError` or a file that cannot be
    used, with 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP. (While it trains, a run has its own
    way to stop.)

    Args:
        debug: let their tracebacks through.
        is_first: asked before the line is printed; False if another process of the run has
            printed one.
    """
    try:
        with _signals_raised():
            yield
    except (UserError, OSError) as error:
        of_a_file = isinstance(error, OSError) and error.filename is not None
        if debug or not (of_a_file or isinstance(error, UserError)):
            raise
        _drop_full_logs()
        if is_first():
            text = f"{error.filename}: {error.strerror}" if of_a_file else str(error)
            print(f"error: {_printable(text)}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt as asked:
        if debug:
            raise
        number = asked.number if isinstance(asked, Terminated) else signal.SIGINT
        with handled(signal.SIG_IGN, stop_signals()):  # once more says nothing new
            if is_first():
                name = signal.Signals(number).name
                with contextlib.suppress(OSError):  # the terminal may be gone
                    print(f"Stopped by {name}: what was saved stays", file=sys.stderr, flush=True)
        sys.exit(exit_status(number))


def _printable(text: str) -> str:
    """On one line, whatever characters a name in it has: breaks and escapes as Python writes
    them."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """Inside of it signals that ask to stop raise :class:`Terminated`, Ctrl-C as always."""
    owner = os.getpid()

    def receive(number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() == owner:
            raise Terminated(number)
        os._exit(exit_status(number))  # a process that this one has forked

    with handled(receive, [number for number in stop_signals() if number != signal.SIGINT]):
        yield


@contextlib.contextmanager
def handled(handler: Any, numbers: Sequence[int]) -> Iterator[None]:
    """Inside of it signals are handled in another way, if this is the main thread, which alone may
    say so.

    Args:
        handler: as for ``signal.signal``.
        numbers: of the signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for number, its_handler in before:
            signal.signal(number, its_handler)


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

"""Processes that load data for the one that trains or evaluates."""

import functools
import os
import signal
import threading

from torch.utils.data import get_worker_info


def leave_signals_to_parent() -> None:
    """Called before every sample, lets a worker go on until its parent has done its last step,
    whoever else sends signals to a whole group of processes. The parent may end it. In the process
    that trains or evaluates itself nothing happens."""
    if get_worker_info() is not None:
        _leave_signals(os.getpid())


@functools.lru_cache  # once per process; one that is forked takes over what the other remembers
def _leave_signals(process: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

"""Processes that load data for the one that trains or evaluates."""

import os
import signal
import threading


def leave_signals_to_parent() -> None:
    """Called in a worker, which then goes on until its parent has done its last step, whoever else
    sends signals to a whole group of processes. The parent may end it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

"""One run at a time in a folder: two would overwrite each other's files."""

import fcntl
import os
from typing import Dict

from d2kd.errors import UserError

# Of the folders that this process holds. The system gives a lock back when its process ends,
# however that comes.
_handles: Dict[str, int] = {}


def hold_folder(folder: str) -> None:
    """Keeps other processes from training in a folder until this one ends. Where the file system
    has no locks for folders, nobody is kept.

    Args:
        folder: is made if need be.

    Raises:
        UserError: if another process trains in it.
    """
    folder = os.path.realpath(folder)
    if folder in _handles:
        return
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(handle)
        raise UserError(
            f"OUTPUT_DIR '{folder}': another process trains in it right now: wait for its end, or "
            "give another OUTPUT_DIR"
        ) from e
    except OSError:
        os.close(handle)
        return
    _handles[folder] = handle


def _let_go() -> None:
    """In a process that this one forks, such as one that loads data: it may live longer."""
    while _handles:
        os.close(_handles.popitem()[1])


os.register_at_fork(after_in_child=_let_go)

"""One run at a time in a folder: two would overwrite each other's files."""

import fcntl
import logging
import os
from typing import Dict

from d2kd.errors import UserError

logger = logging.getLogger(__name__)

# Where a file system has no locks for folders, as NFS, this file in it is locked
LOCK = ".lock"
# Of the folders that this process holds. The system gives a lock back when its process ends,
# however that comes.
_handles: Dict[str, int] = {}


def hold_folder(folder: str) -> None:
    """Keeps other processes from training in a folder until this one ends. Where the file system
    has no locks at all, nobody is kept, which is logged.

    Args:
        folder: is made if need be.

    Raises:
        UserError: if another process trains in it.
    """
    folder = os.path.realpath(folder)
    if folder in _handles:
        return
    os.makedirs(folder, exist_ok=True)
    try:
        try:
            _handles[folder] = _locked(folder, os.O_RDONLY)
        except BlockingIOError:
            raise
        except OSError:
            _handles[folder] = _locked(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT)
    except BlockingIOError as error:
        raise UserError(
            f"OUTPUT_DIR '{folder}': another process trains in it right now: wait for its end, or "
            "give another OUTPUT_DIR"
        ) from error
    except OSError as error:
        logger.warning(
            f"OUTPUT_DIR '{folder}' cannot be locked ({error.strerror}): see to it that no other "
            "run writes into it"
        )


def _locked(path: str, flags: int) -> int:
    """A handle of a folder or file that no other process has locked.

    Raises:
        BlockingIOError: if one has.
        OSError: if there can be no lock.
    """
    handle = os.open(path, flags, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _let_go() -> None:
    """In a process that this one forks, such as one that loads data: it may live longer."""
    while _handles:
        os.close(_handles.popitem()[1])


os.register_at_fork(after_in_child=_let_go)

"""Writing files that appear whole or not at all."""

import contextlib
import errno
import os
import shutil
from typing import Any, Iterator, Optional

from detectron2.utils.file_io import PathManager

from d2kd.errors import UserError

UNFINISHED = ".unfinished"  # ending of a file while it is written
# What a disk says that takes no more
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
# What it says of a path that no file or folder can have, however much room there is
_WRONG_PLACE = (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError)


class AtomicPathManager:
    """Detectron2's path manager for a checkpointer, but a file of the local disk that is opened
    with "w" is written under another name, brought to the disk, and renamed at the end."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r", **kwargs) -> Any:
        if "w" in mode:
            return atomic_write(path, mode)
        return PathManager.open(path, mode, **kwargs)


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[Any]:
    """
    Args:
        path: a file of the local disk, which keeps what it holds until all is written.
        mode: "w" or "wb".

    Raises:
        UserError: if the disk takes no more. What was written is gone then.
    """
    partial = path + UNFINISHED
    try:
        if os.path.islink(partial):  # which would lead to another file
            os.remove(partial)
        with open(partial, mode, opener=_not_through_links) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        _sync_folder(os.path.dirname(path) or ".")
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(partial)
        disk_error = _disk_error(e)
        if disk_error is None:
            raise
        raise UserError(cannot_write(path, disk_error)) from e


def _not_through_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def refuse_existing(path: str, option: str) -> None:
    """Called before work whose result is to be written, so that it is not lost.

    Args:
        path: of the file to write.
        option: of the command line, that gives another one.

    Raises:
        UserError: if there is such a file, or no folder for it.
    """
    if os.path.exists(path):
        raise UserError(f"{path} exists: remove it, or give another {option}")
    refuse_no_folder(path, option)


def refuse_no_folder(path: str, option: str) -> None:
    """As :func:`refuse_existing`, where a file may be replaced.

    Raises:
        UserError: if there is no folder for the file.
    """
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(f"{option} is '{path}': there is no folder '{folder}': make it first")


def _disk_error(error: BaseException) -> Optional[BaseException]:
    """What the disk said, if it was the disk. The writer of torch's archives hides it behind errors
    of its own."""
    cause: Optional[BaseException] = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__context__
    archive = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return error if archive else None


def cannot_write(path: str, error: BaseException) -> str:
    """One line on why a file or folder cannot be written."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free / 2**20
        why = getattr(error, "strerror", None) or "writing failed"
        if isinstance(error, _WRONG_PLACE):
            return f"{path} cannot be made: {why}; give another folder"
        return (
            f"{path} cannot be written: {why} ({free:.1f} MB free); what stood there before is "
            "intact: make room and go on with --resume, or give another OUTPUT_DIR"
        )
    return f"{path} cannot be written: {error}; give another OUTPUT_DIR"


def _sync_folder(folder: str) -> None:
    """Brings a new name to the disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)

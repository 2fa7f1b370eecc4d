"""Two runs do not write into one folder."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from d2kd.engine.folder_lock import LOCK, hold_folder
from d2kd.errors import UserError

# Holds a folder, forks a process that lives longer, and waits
HOLDER = """
import os, sys, time
from d2kd.engine.folder_lock import hold_folder
hold_folder(sys.argv[1])
if os.fork() == 0:
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_held_until_its_process_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process trains in it right now"):
            hold_folder(str(tmp_path))
        hold_folder(str(tmp_path / "another"))
        holder.kill()
        holder.wait()
        time.sleep(0.1)  # the forked process still lives
        hold_folder(str(tmp_path))
        hold_folder(str(tmp_path))  # once more in this process
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
    assert os.listdir(tmp_path) == ["another"]


def test_a_file_is_locked_where_folders_cannot_be(tmp_path, monkeypatch):
    """As on NFS, which locks nothing that is not open for writing."""
    locked = fcntl.flock

    def of_files_alone(handle, operation):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        locked(handle, operation)

    monkeypatch.setattr(fcntl, "flock", of_files_alone)
    hold_folder(str(tmp_path))
    assert os.listdir(tmp_path) == [LOCK]
    with open(tmp_path / LOCK) as other, pytest.raises(BlockingIOError):
        locked(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_that_cannot_be_locked_is_told(tmp_path, monkeypatch, caplog):
    def none(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    hold_folder(str(tmp_path))
    assert "cannot be locked (No locks available): see to it that no other run" in caplog.text

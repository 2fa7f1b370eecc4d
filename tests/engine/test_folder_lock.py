"""Two runs do not write into one folder."""

import os
import signal
import subprocess
import sys
import time

import pytest

from d2kd.engine.folder_lock import hold_folder
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

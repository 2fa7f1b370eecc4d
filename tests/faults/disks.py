"""Runs on a small disk that is full at a random byte."""

import contextlib
import os
import random
import subprocess

from forked import forked_run
from runs import run_config

from d2kd.checkpoint import newest_checkpoint


@contextlib.contextmanager
def small_disk(folder):
    """A folder of memory, and a function that sets how many KB it takes; None if not permitted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return

    def resize(kilobytes):
        option = f"remount,size={kilobytes}k"
        subprocess.run(["mount", "-o", option, str(folder)], check=True, capture_output=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def run_disks(folder, dataset, number, seed):
    choose, wrong, lines, saved = random.Random(seed), [], 0, 0
    for i in range(number):
        place, disk = folder / str(i), folder / f"disk{i}"
        place.mkdir(), disk.mkdir()
        cfg = run_config(place, "FCOS", dataset, ["OUTPUT_DIR", str(disk / "run")])
        path = place / "config.yaml"
        path.write_text(cfg.dump())
        with small_disk(disk) as resize:
            if resize is None:
                return "disk full: not tried, no permission to mount", []
            resize(choose.randrange(40, 16000))
            log = place / "log.txt"
            status = forked_run(str(path), log)
            text = log.read_text()
            if status and text.count("error: ") != 1 or "Traceback" in text:
                wrong.append(f"disk {i}: status {status}\n{text[-1500:]}")
            lines += status == 1
            left = [n for _, _, names in os.walk(disk) for n in names if n.endswith(".unfinished")]
            if left:
                wrong.append(f"disk {i}: {left} is left")
            newest = newest_checkpoint(cfg.OUTPUT_DIR)
            saved += newest is not None
            resize(64000)
            if forked_run(str(path), log, flags=["--resume"]):
                wrong.append(f"disk {i}: not resumed\n{log.read_text()[-1500:]}")
    return f"{number} small disks: {lines} ended with one line, {saved} with a checkpoint", wrong

#!/usr/bin/env python
"""Trains a tiny recipe for many steps, and reports what grows: memory, the CPU time of a step,
open files, threads, and the log. What grows without bound ends a run after days.

    python tools/long_run.py --steps 20000

Every slope is that of a straight line through the last nine tenths of the samples, per 1 000 steps.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from typing import Dict, List

import numpy as np
import torch
from detectron2.engine import HookBase
from tabulate import tabulate

from d2kd.config import read_config
from d2kd.engine.launch import set_up_process
from d2kd.engine.trainer import DistillTrainer
from d2kd.one_line import exit_on_user_error

OPTS = {
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "SOLVER.IMS_PER_BATCH": "1",
    "SOLVER.WARMUP_ITERS": "10",
    "DATALOADER.NUM_WORKERS": "1",
    "DISTILL.TEACHER.WEIGHTS": "d2kd://fcos_tiny_teacher.pth",
    "MODEL.DEVICE": "cpu",
    "SEED": "1",
}
PAGE = os.sysconf("SC_PAGE_SIZE")


def sample(folder: str) -> Dict[str, float]:
    """What this process has now."""
    with open("/proc/self/statm") as f:
        resident = int(f.read().split()[1]) * PAGE
    files = (os.path.join(folder, name) for name in ("log.txt", "metrics.json"))
    return {
        "resident memory (MiB)": resident / 2**20,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "log.txt and metrics.json (KiB)": sum(map(os.path.getsize, files)) / 2**10,
    }


class Sampler(HookBase):
    """Takes a sample every few steps; the time of a step is the median of those between. It is
    the time of this process, which says the same on a busy machine."""

    def __init__(self, period: int):
        self.period = period
        self.steps: List[int] = []
        self.samples: List[Dict[str, float]] = []
        self._times: List[float] = []

    def before_step(self) -> None:
        self._start = time.process_time()

    def after_step(self) -> None:
        self._times.append(time.process_time() - self._start)
        if len(self._times) == self.period:
            taken = sample(self.trainer.cfg.OUTPUT_DIR)
            taken["CPU time of a step (ms)"] = 1000 * float(np.median(self._times))
            self.steps.append(self.trainer.iter + 1)
            self.samples.append(taken)
            self._times.clear()


def report(sampler: Sampler) -> str:
    """A table: first and last sample, and the slope of each quantity."""
    skipped = len(sampler.steps) // 10
    rows = []
    for name in sampler.samples[0]:
        values = [taken[name] for taken in sampler.samples]
        slope = np.polyfit(sampler.steps[skipped:], values[skipped:], 1)[0] * 1000
        rows.append([name, f"{values[skipped]:.1f}", f"{values[-1]:.1f}", f"{slope:+.3f}"])
    headers = ["", f"step {sampler.steps[skipped]}", f"step {sampler.steps[-1]}", "per 1 000 steps"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config-file", default="shapes/frs/fcos_tiny.yaml")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--period", type=int, default=100, help="steps between two samples")
    args = parser.parse_args()
    if args.steps < 20 * args.period:
        sys.exit(f"error: give --steps of {20 * args.period} or more, 20 samples")
    torch.set_num_threads(1)
    sampler = Sampler(args.period)
    with tempfile.TemporaryDirectory() as folder, exit_on_user_error(False):
        opts = {**OPTS, "OUTPUT_DIR": folder, "SOLVER.MAX_ITER": str(args.steps)}
        cfg = read_config(args.config_file, [word for pair in opts.items() for word in pair])
        args.eval_only = False
        set_up_process(cfg, args)
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.register_hooks([sampler])
        trainer.train()
    print(report(sampler))


if __name__ == "__main__":
    main()

"""A run of seconds in a process of its own: ``python tests/small_run.py DATA_FOLDER ARGUMENTS…``,
with the arguments of ``train_net.py``."""

import dataclasses
import os
import subprocess
import sys

from d2kd.cli.main import train as main
from d2kd.data.builtin import register_shapes
from d2kd.data.shapes import SPECS

TOY = dataclasses.replace(
    SPECS["shapes_tiny"],
    name="toy",
    sizes=((96, 64), (64, 96)),
    radius=(8, 20),
    images={"train": 24, "val": 6},
)
FRS = "shapes/frs/fcos_tiny.yaml"
FCOS = "shapes/baselines/fcos_tiny.yaml"
SMALL = {
    "DATASETS.TRAIN": "('toy_train',)",
    "DATASETS.TEST": "('toy_val',)",
    "INPUT.MIN_SIZE_TRAIN": "(64, 80)",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.MAX_ITER": "6",
    "SOLVER.CHECKPOINT_PERIOD": "3",
    "SOLVER.WARMUP_ITERS": "4",
    "TEST.EVAL_PERIOD": "0",
    "DATALOADER.NUM_WORKERS": "0",
    "MODEL.DEVICE": "cpu",
    "SEED": "5",
}


TWO = ["--num-gpus", "2"]  # processes, which run on the CPU here
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def command(data, output, *opts, config=FRS, flags=(), launcher=()):
    """The command of a small run; ``opts`` are KEY VALUE ..."""
    changed = {**SMALL, "OUTPUT_DIR": str(output), **dict(zip(opts[::2], map(str, opts[1::2])))}
    pairs = [word for pair in changed.items() for word in pair]
    return [
        sys.executable,
        "-W",
        "ignore",
        *launcher,
        __file__,
        str(data),
        "--config-file",
        config,
        *flags,
        *pairs,
    ]


def environment(**more):
    """That of a run on one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def start(*args, **kwargs):
    """Starts a small run; its output is text in two pipes."""
    env = environment(**kwargs.pop("env", {}))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*args, **kwargs), env=env, **pipes)


def finish(*args, **kwargs):
    """Runs it to its end: (status, stdout, stderr)."""
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


if __name__ in ("__main__", "__mp_main__"):  # also in the processes that it starts
    register_shapes(TOY, sys.argv[1])
if __name__ == "__main__":
    main(sys.argv[2:])

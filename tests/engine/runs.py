"""Whole runs in this process, and what they leave."""

import json

import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from toys import distill_config

from d2kd.engine import DistillTrainer

TIMES = ("time", "eta_seconds", "max_memory")


def run_config(folder, student, toy_dataset, opts=(), **kwargs):
    """A run of six steps with a checkpoint after three and an evaluation after two."""
    train, val = toy_dataset
    short = ["DATASETS.TRAIN", (train,), "DATASETS.TEST", (val,), "INPUT.MIN_SIZE_TRAIN", (64, 80)]
    short += ["SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.IMS_PER_BATCH", 2]
    short += ["TEST.EVAL_PERIOD", 2, "SOLVER.WARMUP_ITERS", 4, "SEED", 5]
    folder.mkdir(exist_ok=True)
    return distill_config(folder, student, [*short, *opts], **kwargs)


class Killed(BaseException):
    """Ends a run without a word."""


class At(HookBase):
    """Does something at the beginning of a step."""

    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.action(self.trainer)


def kill(trainer):
    raise Killed


def train(cfg, resume=False, at=None, action=kill):
    """Trains until it ends, or until it is killed at an iteration."""
    seed_all_rng(cfg.SEED)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    if at is not None:
        trainer.register_hooks([At(at, action)])
    try:
        trainer.train()
    except Killed:
        assert at is not None
    return trainer


def metrics(cfg):
    """Lines of a run's metrics without times."""
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as f:
        lines = [json.loads(line) for line in f]
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]


def saved(cfg, name="model_final.pth"):
    """Tensors and numbers of a checkpoint by their place in it, times left out."""
    data = torch.load(f"{cfg.OUTPUT_DIR}/{name}", weights_only=True)
    return {k: v for k, v in _leaves(data, "") if not any(t in k for t in TIMES)}


def _leaves(value, place):
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(entry, f"{place}/{key}")
    elif isinstance(value, (list, tuple)) and len(value) < 100:
        for i, entry in enumerate(value):
            yield from _leaves(entry, f"{place}/{i}")
    else:
        yield place, value


def assert_same_run(one, other):
    """Weights, optimizer, random states and metrics are equal."""
    left, right = saved(one), saved(other)
    assert left.keys() == right.keys()
    for place, value in left.items():
        theirs = right[place]
        same = torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs
        assert same or value != value, place
    assert repr(metrics(one)) == repr(metrics(other))

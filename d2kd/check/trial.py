"""A few steps of a run, before it starts: whether they work, and what they take."""

import itertools
import statistics
from functools import partial
from typing import Dict, List, NamedTuple, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.evaluation.evaluator import inference_context
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from d2kd.benchmark.profile import peak_memory, timed
from d2kd.engine import DistillTrainer
from d2kd.engine.averaging import EMAHook

from .levels import warn_of_unused_levels

_MEASURED = 3  # steps, after a first one, in which processes and caches start
_BATCHES = 4  # of the student's inference, and whose boxes are looked at
_MiB = 2**20


class Trial(NamedTuple):
    """What a few steps came to."""

    losses: Dict[str, float]  # of the first one
    seconds: float  # of a step
    waiting: float  # seconds of these in which no batch was there
    image_seconds: float  # of the student's inference on an image; 0 if nothing is evaluated
    memory: float  # MiB, the peak


def try_steps(cfg: CfgNode) -> Trial:
    """Takes steps as training would, on its data: the first of the run, and some from its middle,
    in which its methods are at work.

    Args:
        cfg: of a run of one process. In its ``OUTPUT_DIR`` logs are written.

    Raises:
        UserError: for whatever keeps the run from training.
    """
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.model.train()
    warn_of_unused_levels(trainer.bare_model, _some_boxes(trainer))
    with EventStorage(0) as storage:
        step = partial(_step, trainer, storage)
        losses, _, _ = step(0)
        middle = cfg.SOLVER.MAX_ITER // 2
        measured = [step(middle + i) for i in range(_MEASURED)]
        _, seconds, waiting = zip(*measured)
        memory = peak_memory(lambda: step(middle), cfg.MODEL.DEVICE)
    return Trial(
        losses,
        statistics.median(seconds),
        statistics.median(waiting),
        _inference_seconds(cfg, trainer.student),
        memory + _standing_memory(trainer),
    )


def _some_boxes(trainer: DistillTrainer) -> List[Boxes]:
    """Ground truth of some images, as training sees them."""
    batches = itertools.islice(trainer.data_loader, _BATCHES)
    return [x["instances"].gt_boxes for batch in batches for x in batch]


def _step(
    trainer: DistillTrainer, storage: EventStorage, iteration: int
) -> Tuple[Dict[str, float], float, float]:
    """Losses by name, seconds, seconds of waiting for data."""
    seconds = timed(partial(trainer.step_without_hooks, iteration, storage))
    latest = {name: value for name, (value, _) in storage.latest().items()}
    losses = {name: value for name, value in latest.items() if name.startswith("loss_")}
    return losses, seconds, latest.get("data_time", 0.0)


def _inference_seconds(cfg: CfgNode, student: nn.Module) -> float:
    if not cfg.DATASETS.TEST:
        return 0.0
    loader = DistillTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    seconds = []
    with inference_context(student), torch.no_grad():
        for inputs in itertools.islice(loader, _BATCHES):
            seconds.append(timed(partial(student, inputs)) / len(inputs))
    return statistics.median(seconds)


def _standing_memory(trainer: DistillTrainer) -> float:
    """MiB of the tensors that stand between two steps."""
    if trainer.cfg.MODEL.DEVICE.startswith("cuda"):
        return torch.cuda.memory_allocated() / _MiB
    model = trainer.bare_model
    teacher = getattr(model, "teacher", None)
    averages = [hook.average for hook in trainer._hooks if isinstance(hook, EMAHook)]
    modules = [model, *([teacher.detector] if teacher else []), *averages]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    states = trainer.optimizer.state.values()
    tensors += [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / _MiB

"""One optimizer step over several batches, for batches that the memory does not take at once."""

import contextlib
import time
from typing import ContextManager, Dict, List

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def accumulated_step(trainer: SimpleTrainer, batches: int) -> None:
    """What ``run_step`` of Detectron2's trainers does, with the mean of the gradients, and of the
    losses that are logged, over several batches.

    Args:
        trainer: in full or in mixed precision.
        batches: that it takes from its data.
    """
    optimizer, scaler = trainer.optimizer, getattr(trainer, "grad_scaler", None)
    optimizer.zero_grad()
    losses: List[Dict[str, Tensor]] = []
    seconds = 0.0
    for left in reversed(range(batches)):
        start = time.perf_counter()
        data = next(trainer._data_loader_iter)
        seconds += time.perf_counter() - start
        with _gradients_kept_here(trainer.model, left > 0):
            with _precision(trainer):
                losses.append(trainer.model(data))
            share = sum(losses[-1].values()) / batches
            (scaler.scale(share) if scaler else share).backward()
        losses[-1] = {name: loss.detach() for name, loss in losses[-1].items()}
    means = {name: sum(entry[name] for entry in losses) / batches for name in losses[0]}
    trainer._write_metrics(means, seconds)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()


def _gradients_kept_here(model: nn.Module, kept: bool) -> ContextManager:
    """Of several processes only the last batch's backward pass adds up the gradients of all."""
    if kept and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _precision(trainer: SimpleTrainer) -> ContextManager:
    if not isinstance(trainer, AMPTrainer):
        return contextlib.nullcontext()
    # Release 0.6 has no attribute for the type: it is float16
    return torch.autocast("cuda", dtype=getattr(trainer, "precision", torch.float16))

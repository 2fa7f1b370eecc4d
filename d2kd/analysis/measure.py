"""Size, operations and latency of one detector."""

import logging
import os
from functools import partial
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

from d2kd.benchmark.profile import timed
from d2kd.engine.versions import processor_name

# Passes that are not timed: the first ones allocate memory and choose algorithms
WARM_UP = 3


class Latency(NamedTuple):
    """Milliseconds of one image, from pixels on the device to detections, over several passes."""

    median: float
    p90: float
    p99: float


class Size(NamedTuple):
    """How big a detector is."""

    parameters: int
    weights_bytes: int  # on disk, without optimizer
    gflops: float  # for one image; a multiplication with its addition counts once


def size_of(detector: nn.Module, inputs: Dict[str, Any]) -> Size:
    """
    Args:
        detector: in eval mode.
        inputs: of one image, as Detectron2 takes them.
    """
    return Size(
        parameters=sum(p.numel() for p in detector.parameters()),
        weights_bytes=sum(x.numel() * x.element_size() for x in detector.state_dict().values()),
        gflops=gflops(detector, inputs),
    )


@torch.no_grad()
def gflops(detector: nn.Module, inputs: Dict[str, Any]) -> float:
    """By Detectron2's counter, in 10^9. Of two stages, the second depends on the image."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    counter = FlopCountAnalysis(detector, [inputs])
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return counter.tracer_warnings("none").total() / 1e9


@torch.no_grad()
def latencies(detectors: Sequence[Tuple[nn.Module, Dict[str, Any]]], repeats: int) -> List[Latency]:
    """Of batches of one image. The detectors take turns, so that whatever else the machine does
    slows all of them down.

    Args:
        detectors: each in eval mode, with the inputs of one image on its device.
        repeats: timed passes of each.
    """
    passes = [partial(detector, [inputs]) for detector, inputs in detectors]
    for one in passes * WARM_UP:
        timed(one)
    times = [[timed(one) * 1e3 for one in passes] for _ in range(repeats)]  # (repeats, detectors)
    percentiles = np.percentile(times, (50, 90, 99), axis=0)
    return [Latency(*map(float, column)) for column in percentiles.T]


def device_name(device: torch.device) -> str:
    """For people: the GPU, or the processor and how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{processor_name()}, {threads}"

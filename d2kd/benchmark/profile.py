"""What a step costs: seconds, memory, and torch's operations."""

import json
import os
import statistics
import tempfile
import time
import warnings
from typing import Callable, Dict, List

import torch
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], None]


def timed(step: Step) -> float:
    """Seconds that a step takes, what it started on a GPU included."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_initialized():  # not for the sake of the clock alone
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(step: Step, device: str) -> float:
    """MiB of tensors that a step adds, at its peak, to those that stand before. Exact, and the same
    in every run: it counts what is asked of the allocator."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it reports a missing GPU as an error
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(trace)
        with open(trace) as f:
            events = [e for e in json.load(f)["traceEvents"] if e["name"] == "[memory]"]
    # One event per allocation and release, of tensors made in the step alone. Each names the total
    # then: clocks of two cores may disagree on the order of the events.
    totals = [e["args"]["Total Allocated"] for e in events]
    before = totals[0] - events[0]["args"]["Bytes"] if events else 0
    return (max([before, *totals]) - before) / 2**20


def gflops(step: Step) -> float:
    """10^9 multiplications with their additions, of convolutions and matrix products, forward and
    backward. The same on every machine."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 2e9  # torch counts the addition by itself


def host_syncs(step: Step, device: str) -> int:
    """How often the host waits for a GPU in a step; 0 on a CPU, where there is nothing to wait
    for."""
    if not device.startswith("cuda"):
        return 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Torch announces the mode itself with a warning of other words
    return sum("called a synchronizing" in str(warning.message) for warning in said)


def operations(step: Step, device: str) -> Dict[str, float]:
    """Milliseconds that a step spends in each of torch's operations, those that it calls not
    counted."""
    with torch.autograd.profiler.profile(use_device="cuda" if "cuda" in device else None) as prof:
        step()
    kind = "self_device_time_total" if "cuda" in device else "self_cpu_time_total"
    return {event.key: getattr(event, kind) / 1e3 for event in prof.key_averages()}


def additional(steps: Dict[str, Step], device: str, rounds: int) -> Dict[str, float]:
    """Milliseconds per operation that the step "c" takes beyond "a" and "b", medians over rounds,
    highest first."""
    found: Dict[str, List[float]] = {}
    for _ in range(rounds):
        a, b, c = (operations(steps[name], device) for name in "abc")
        for key in c:
            found.setdefault(key, []).append(c[key] - a.get(key, 0.0) - b.get(key, 0.0))
    medians = {key: statistics.median(values) for key, values in found.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))

#!/usr/bin/env python
"""What distillation costs: times the plain student's step, the teacher, and the distillation step
side by side in one process, with random weights and images.

    python tools/benchmark.py configs/frs/retinanet_R_50_R_101-1x_2x.yaml MODEL.DEVICE cpu

Prints c/a and c/(a+b), where a is the plain step, b the teacher's forward as far as the methods
need it, c the distillation step; medians over rounds in which the three alternate. And the memory
of tensors that a and c add, at their peak, to the model and the state of the optimizer. On Linux
the process keeps the memory that it frees, as a GPU's allocator does. With --ops, also in which of
torch's operations c spends its additional time.
"""

import argparse
import ctypes
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from typing import Callable, Dict, List, Tuple

import torch
from compare import read_config
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from d2kd.errors import UserError
from d2kd.modeling import StudentView, TeacherStudent, build_model
from d2kd.modeling.build import build_teacher_detector
from d2kd.modeling.recorder import Recorder

PARTS = {
    "a": "plain student step",
    "b": "teacher, as far as needed",
    "c": "distillation step",
}


# How each thing that a method may read of the teacher is had
READ = {
    "stages": lambda teacher, student: teacher.stages,
    "features": lambda teacher, student: teacher.features,
    "dense": lambda teacher, student: teacher.dense.logits,
    "tower": lambda teacher, student: teacher.dense.logits,
    "tower_statistics": lambda teacher, student: teacher.dense.logits,
    "proposals": lambda teacher, student: teacher.proposals,
    "rois": lambda teacher, student: teacher.rois([p.proposal_boxes for p in student.proposals]),
}


def keep_freed_memory() -> None:
    """Otherwise glibc hands large tensors back to the kernel, now and then: a tenth of a step's
    time, at random in one part or the other."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_..., malloc.h
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**30)


def random_batch(args: argparse.Namespace, num_classes: int) -> List[dict]:
    """Images of noise with random boxes, always the same."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(args.batch):
        corner = torch.rand(args.boxes, 2, generator=generator) * args.size * 0.6
        size = (0.05 + 0.35 * torch.rand(args.boxes, 2, generator=generator)) * args.size
        instances = Instances((args.size, args.size))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(num_classes, (args.boxes,), generator=generator)
        shape = (3, args.size, args.size)
        image = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


def build(cfg: CfgNode) -> TeacherStudent:
    """The model of a recipe, with a teacher of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        cfg.DISTILL.TEACHER.WEIGHTS = os.path.join(folder, "teacher.pth")
        teacher, _, _ = build_teacher_detector(cfg)
        torch.save({"model": teacher.state_dict()}, cfg.DISTILL.TEACHER.WEIGHTS)
        model = build_model(cfg)
    if not isinstance(model, TeacherStudent):
        raise UserError("DISTILL.METHODS is empty, or all weights are 0: nothing to compare")
    return model.train()


def training_step(model: nn.Module, inputs: List[dict]) -> Callable[[], None]:
    """Forward, backward and the optimizer's step. The learning rate of 0 keeps the work equal; no
    gradient is left behind."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step():
        sum(model(inputs).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def teacher_forward(model: TeacherStudent, inputs: List[dict]) -> Callable[[], None]:
    """Runs the teacher alone, as far as the methods of the model read it."""
    active = {name: distiller.terms for name, distiller in model.distillers.items()}
    needs = model.needs(active, "teacher")
    with Recorder(model.family.taps(model.needs(active, "student"))) as recorder:
        model.student(inputs)
    sizes = [tuple(x["image"].shape[-2:]) for x in inputs]
    student = StudentView(model.family, recorder, sizes)

    def forward():
        teacher = model.teacher.view(inputs, student, needs)
        for need in needs:
            READ[need.split(".")[0]](teacher, student)

    return forward


def parts(cfg: CfgNode, args: argparse.Namespace) -> Dict[str, Callable[[], None]]:
    model = build(cfg)
    inputs = random_batch(args, model.family.num_classes)
    return {
        "a": training_step(model.student, inputs),
        "b": teacher_forward(model, inputs),
        "c": training_step(model, inputs),
    }


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(step: Callable[[], None], device: str) -> float:
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
    # One event per allocation (bytes > 0) and release (< 0); of tensors made in the step alone
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(itertools.accumulate(sizes), default=0) / 2**20


def operations(step: Callable[[], None], device: str) -> Dict[str, float]:
    """Milliseconds that a step spends in each of torch's operations, those that it calls not
    counted."""
    with torch.autograd.profiler.profile(use_device="cuda" if "cuda" in device else None) as prof:
        step()
    kind = "self_device_time_total" if "cuda" in device else "self_cpu_time_total"
    return {event.key: getattr(event, kind) / 1e3 for event in prof.key_averages()}


def additional(steps: Dict[str, Callable[[], None]], device: str, rounds: int) -> Dict[str, float]:
    """Milliseconds per operation that c takes beyond a and b, medians over rounds."""
    found: Dict[str, List[float]] = {}
    for _ in range(rounds):
        a, b, c = (operations(steps[name], device) for name in "abc")
        for key in c:
            found.setdefault(key, []).append(c[key] - a.get(key, 0.0) - b.get(key, 0.0))
    medians = {key: statistics.median(values) for key, values in found.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def measure(
    cfg: CfgNode, args: argparse.Namespace
) -> Tuple[Dict[str, List[float]], Dict[str, float], Dict[str, float]]:
    """Seconds of every round by part; peak memory in MiB of the parts that train; if asked for,
    :func:`additional` milliseconds by operation."""
    keep_freed_memory()
    torch.manual_seed(0)
    with EventStorage(cfg.SOLVER.MAX_ITER // 2):
        steps = parts(cfg, args)
        for step in steps.values():
            timed(step)
        seconds: Dict[str, List[float]] = {name: [] for name in steps}
        for turn in range(args.rounds):
            order = list(steps)[turn % 3 :] + list(steps)[: turn % 3]
            for name in order:
                seconds[name].append(timed(steps[name]))
        memory = {name: peak_memory(steps[name], cfg.MODEL.DEVICE) for name in "ac"}
        ops = additional(steps, cfg.MODEL.DEVICE, args.rounds) if args.ops else {}
    return seconds, memory, ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a recipe")
    parser.add_argument("--size", type=int, default=512, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--boxes", type=int, default=7, help="objects per image")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each part")
    parser.add_argument("--ops", type=int, default=0, help="show so many operations")
    parser.add_argument("opts", nargs="*", help="KEY VALUE ...")
    args = parser.parse_intermixed_args()
    try:
        cfg = read_config(args.config, args.opts)
        seconds, memory, ops = measure(cfg, args)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")

    median = {name: statistics.median(values) for name, values in seconds.items()}
    a, b, c = (seconds[name] for name in "abc")
    rows = [
        [f"{k}: {PARTS[k]}", f"{median[k]:.3f}", f"{memory[k]:.0f}" if k in memory else ""]
        for k in PARTS
    ]
    where = torch.cuda.get_device_name() if cfg.MODEL.DEVICE.startswith("cuda") else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads, {args.batch} x {args.size}², float32")
    print(tabulate(rows, ["", "seconds", "peak MiB"], "github", disable_numparse=True))
    print(f"c/a     {statistics.median(z / x for x, z in zip(a, c)):.3f}")
    print(f"c/(a+b) {statistics.median(z / (x + y) for x, y, z in zip(a, b, c)):.3f}")
    print(f"memory c/a {memory['c'] / memory['a']:.3f}")
    if ops:
        rows = [[name, f"{ms:.1f}"] for name, ms in [*ops.items()][: args.ops]]
        print(
            "\n" + tabulate(rows, ["operation", "ms in c - a - b"], "github", disable_numparse=True)
        )


if __name__ == "__main__":
    main()

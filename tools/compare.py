#!/usr/bin/env python
"""Trains several configs with several seeds and compares them in a table.

    python tools/compare.py shapes/fcos_tiny.yaml shapes/frs_fcos_tiny.yaml --seeds 1 2 3
    python tools/compare.py CONFIG CONFIG --opts SOLVER.MAX_ITER 1000

Runs that are finished are not repeated, an interrupted one is resumed. The table is printed and
written as Markdown.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from typing import Dict, List, NamedTuple, Sequence

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from tabulate import tabulate
from tqdm import tqdm

from d2kd.config import add_distill_config, load_yaml
from d2kd.engine import DistillTrainer
from d2kd.errors import UserError
from d2kd.model_zoo import resolve_config
from d2kd.modeling import build_detector

METRICS = ("AP", "AP50", "AP75")


class Run(NamedTuple):
    """A finished run."""

    folder: str
    results: Dict[str, float]  # of the last evaluation
    seconds: float  # of training, evaluations included; 0 if it was not trained here


def read_config(config_file: str, opts: Sequence = ()) -> CfgNode:
    """A config with overrides, as ``train_net.py`` reads it."""
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, resolve_config(config_file, "config"), list(opts))
    return cfg


def name_of(config_file: str) -> str:
    return os.path.splitext(os.path.basename(config_file))[0]


def train(config_file: str, seed: int, output: str, opts: Sequence[str] = ()) -> Run:
    """Trains a config in a process of its own, unless its folder holds the finished run.

    Args:
        config_file: a path or the name of a recipe.
        seed: ``SEED`` of the run.
        output: folder for the runs; this one goes to ``<output>/<config>_seed<seed>``.
        opts: overrides, KEY VALUE ...

    Raises:
        UserError: if the folder holds a run with another config.
        SystemExit: if training fails.
    """
    label = f"{name_of(config_file)}_seed{seed}"
    folder = os.path.join(output, label)
    opts = [*opts, "SEED", str(seed), "OUTPUT_DIR", folder]
    cfg = read_config(config_file, opts)
    saved = os.path.join(folder, "config.yaml")
    if os.path.isfile(saved):
        with open(saved) as f:
            if f.read() != cfg.dump():
                raise UserError(f"{folder} holds a run with another config: remove it")
    summary = os.path.join(folder, "summary.json")
    if not os.path.isfile(summary):
        seconds = _run(resolve_config(config_file, "config"), opts, label, cfg.SOLVER.MAX_ITER)
        with open(summary, "w") as f:
            results = {m: [*scalars(folder, f"bbox/{m}").values()][-1] for m in METRICS}
            json.dump({"seconds": seconds, "results": results}, f)
    with open(summary) as f:
        return Run(folder, **json.load(f))


def _run(path: str, opts: Sequence[str], label: str, max_iter: int) -> float:
    command = [sys.executable, "-m", "d2kd.engine.launch", "--config-file", path, "--resume", *opts]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    tail: List[str] = []
    bar_format = "{desc}: {percentage:3.0f}% |{bar}| {n}/{total} [{elapsed} < {remaining}]"
    with tqdm(total=max_iter, desc=f"train {label}", bar_format=bar_format) as bar:
        for line in process.stdout:
            tail = [*tail[-30:], line]
            match = re.search(r" iter: (\d+) ", line)
            if match:
                bar.update(int(match[1]) + 1 - bar.n)
    if process.wait():
        sys.exit("".join(tail) + f"error: training {label} failed")
    return time.perf_counter() - start


def scalars(folder: str, key: str) -> Dict[int, float]:
    """A scalar of a run by iteration, from its ``metrics.json``."""
    with open(os.path.join(folder, "metrics.json")) as f:
        rows = [json.loads(line) for line in f]
    return {row["iteration"]: row[key] for row in rows if key in row}


def evaluate(config_file: str, weights: str) -> Dict[str, float]:
    """The metrics of a detector that is already trained."""
    cfg = read_config(config_file)
    detector = build_detector(cfg)
    DetectionCheckpointer(detector).load(weights)
    with contextlib.redirect_stdout(io.StringIO()):
        results = DistillTrainer.test(cfg, detector)
    return {m: results["bbox"][m] for m in METRICS}


def parameters(config_file: str, opts: Sequence = ()) -> float:
    """Millions of parameters of the student that a config describes."""
    student = build_detector(read_config(config_file, opts))
    return sum(p.numel() for p in student.parameters()) / 1e6


def table(rows: Dict[str, List[Run]], sizes: Dict[str, float], baseline: str) -> str:
    """A Markdown table with one row per detector: mean and, over several seeds, standard deviation.

    Args:
        rows: the runs of every row, by label.
        sizes: millions of parameters of every row.
        baseline: label of the row that gains are counted from.
    """
    body = []
    for label, runs in rows.items():
        cells = [spread([run.results[m] for run in runs]) for m in METRICS]
        gains = [run.results["AP"] - b.results["AP"] for run, b in zip(runs, rows[baseline])]
        cells.append(spread(gains, "+") if label != baseline and runs[0].seconds else "")
        cells.append(f"{sizes[label]:.2f}")
        cells.append(f"{np.mean([run.seconds for run in runs]):.0f}" if runs[0].seconds else "")
        body.append([label, *cells])
    headers = ["", *METRICS, f"gain over {baseline}", "parameters (M)", "seconds"]
    return tabulate(body, headers, tablefmt="github", disable_numparse=True)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, and the sample's standard deviation where there are several values."""
    mean = f"{np.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="+", help="config files; the first one is the baseline")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="default: 1")
    parser.add_argument("--output", default="output/compare", help="folder for runs and table")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    args = parser.parse_args()
    try:
        rows = {
            name_of(c): [train(c, seed, args.output, args.opts) for seed in args.seeds]
            for c in args.configs
        }
        sizes = {name_of(c): parameters(c, args.opts) for c in args.configs}
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    text = table(rows, sizes, baseline=name_of(args.configs[0]))
    path = os.path.join(args.output, "table.md")
    with open(path, "w") as f:
        f.write(text + "\n")
    print(f"\n{text}\n\nwritten to {path}")


if __name__ == "__main__":
    main()

"""Tables of detectors: accuracy over seeds, gains, size and time."""

import contextlib
import io
import os
from typing import Dict, List, Sequence

import numpy as np
from tabulate import tabulate
from torch import nn

from d2kd.checkpoint import read_weights, written_whole
from d2kd.config import read_config
from d2kd.distillation import build_detector
from d2kd.engine import DistillTrainer
from d2kd.errors import UserError

from .rows import Row, labels_of
from .runs import METRICS, Run, train_row


def compare(rows: Sequence[Row], seeds: Sequence[int], output: str, opts: Sequence[str]) -> str:
    """Trains rows and writes their table to ``<output>/table.md``.

    Args:
        rows: the first one is the baseline.
        seeds: every row is trained with each.
        output: folder for runs and table.
        opts: overrides, KEY VALUE ...

    Returns:
        the table, in Markdown.

    Raises:
        UserError: see :func:`~d2kd.evidence.runs.train_row`.
    """
    labelled = dict(zip(labels_of(rows), rows))
    runs = {
        label: [train_row(row, seed, output, opts) for seed in seeds]
        for label, row in labelled.items()
    }
    sizes = {label: parameters(row.config, [*row.opts, *opts]) for label, row in labelled.items()}
    text = table(runs, sizes, baseline=next(iter(runs)))
    with written_whole(os.path.join(output, "table.md")) as f:
        f.write(text + "\n")
    return text


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


def parameters(config_file: str, opts: Sequence = ()) -> float:
    """Millions of parameters of the student that a config describes."""
    student = build_detector(read_config(config_file, opts))
    return sum(p.numel() for p in student.parameters()) / 1e6


def fill(detector: nn.Module, weights: str) -> None:
    """Reads a detector's weights.

    Raises:
        UserError: if the file leaves any of them as initialised.
    """
    unfilled = read_weights(detector, weights, "the weights")
    if unfilled:
        raise UserError(f"{weights} leaves {len(unfilled)} tensors unfilled, such as {unfilled[0]}")


def evaluate(config_file: str, weights: str) -> Dict[str, float]:
    """The metrics of a detector that is already trained."""
    cfg = read_config(config_file)
    detector = build_detector(cfg)
    fill(detector, weights)
    with contextlib.redirect_stdout(io.StringIO()):
        results = DistillTrainer.test(cfg, detector)
    return {m: results["bbox"][m] for m in METRICS}

"""Tables of detectors: accuracy over seeds, gains, size and time."""

import os
from typing import Dict, List, Sequence, Tuple

import numpy as np
from scipy import stats
from tabulate import tabulate

from d2kd.engine.results import METRICS
from d2kd.writing import atomic_write

from .cells import Cell, by_label, cell_of, write_cells
from .figures import draw_rows
from .rows import Row, labels_of
from .runs import train_rows

# What a comparison leaves in its folder, beside the runs
TABLE, CELLS, FIGURE = "table.md", "cells.json", "figure.png"
# Below that many pairs, no test of a gain says more than its spread
MIN_PAIRS = 5


def compare(
    rows: Sequence[Row], seeds: Sequence[int], output: str, opts: Sequence[str], jobs: int = 1
) -> Tuple[str, str]:
    """Trains rows and writes table, figure, and every run as data to the output folder: those that
    finished, where some failed. Rows without any are left out.

    Args:
        rows: the first one is the baseline.
        seeds: every row is trained with each. All rows of a seed come before the next seed, so that
            a comparison that is interrupted has whole pairs.
        output: folder for runs and table.
        opts: overrides, KEY VALUE ...
        jobs: how many runs are trained at a time.

    Returns:
        the table, in Markdown, and which runs failed and why, in a line; either may be empty.

    Raises:
        UserError: see :func:`~d2kd.comparison.runs.train_rows`.
    """
    labels = labels_of(rows)
    tasks = [(label, row, seed) for seed in seeds for label, row in zip(labels, rows)]
    outcome = train_rows([(row, seed) for _, row, seed in tasks], output, opts, jobs)
    done = [(task, run) for task, run in zip(tasks, outcome.runs) if run is not None]
    cells = [cell_of(*task, run, opts) for task, run in done]
    return _write(cells, labels, output) if cells else "", outcome.problem()


def _write(cells: Sequence[Cell], labels: Sequence[str], output: str) -> str:
    """Writes table, figure and data, and returns the table."""
    found = by_label(cells)
    rows = {label: found[label] for label in labels if label in found}
    write_cells(cells, os.path.join(output, CELLS))
    text = table(rows, baseline=labels[0])
    with atomic_write(os.path.join(output, TABLE)) as f:
        f.write(text + "\n")
    draw_rows(rows, labels[0], os.path.join(output, FIGURE))
    return text


def table(rows: Dict[str, List[Cell]], baseline: str, costs: bool = True) -> str:
    """A Markdown table with one row per detector: mean and, over several seeds, standard deviation.

    Args:
        rows: the cells of every row, by label.
        baseline: label of the row that gains are counted from; without that row, there are none.
        costs: add parameters and seconds.

    Returns:
        the table, with the number of seeds of every row where they differ.
    """
    body = []
    seeds_differ = len({len(cells) for cells in rows.values()}) > 1
    for label, cells in rows.items():
        columns = [str(len(cells))] if seeds_differ else []
        columns += [mean_and_deviation([cell.results[m] for cell in cells]) for m in METRICS]
        columns.append(gain(cells, rows.get(baseline, [])) if label != baseline else "")
        if costs:
            columns.append(f"{cells[0].parameters:.2f}")
            known = all(cell.seconds for cell in cells)
            columns.append(f"{np.mean([cell.seconds for cell in cells]):.0f}" if known else "")
        body.append([label, *columns])
    headers = ["", *(["seeds"] if seeds_differ else []), *METRICS, f"gain over {baseline}"]
    headers += ["parameters (M)", "seconds"] if costs else []
    return tabulate(body, headers, tablefmt="github", disable_numparse=True)


def gain(cells: Sequence[Cell], baseline: Sequence[Cell]) -> str:
    """What rows differ by at equal seeds, see :func:`difference`. "" for a detector that was not
    trained, or has no seed in common.
    """
    values = gains(cells, baseline)
    return difference(values) if values else ""


def difference(values: Sequence[float]) -> str:
    """Mean and deviation of what two rows differ by at equal seeds. From five seeds on with the p
    value of a paired t-test: the chance of a mean as far from 0 if there were no difference.
    """
    text = mean_and_deviation(values, "+")
    if len(values) < MIN_PAIRS or len(set(values)) == 1:
        return text
    p = stats.ttest_1samp(values, 0).pvalue
    return f"{text}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"


def gains(cells: Sequence[Cell], baseline: Sequence[Cell]) -> List[float]:
    """Differences of AP at equal seeds; none of cells that were not trained."""
    plain = {cell.seed: cell.results["AP"] for cell in baseline}
    return [c.results["AP"] - plain[c.seed] for c in cells if c.seconds != 0 and c.seed in plain]


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """Mean, and the sample's standard deviation where there are several values."""
    mean = f"{np.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"

"""Figures of comparisons."""

from typing import Dict, List

import numpy as np
from matplotlib.figure import Figure

from d2kd.labels import as_label
from d2kd.writing import atomic_write

from .cells import Cell


def draw_rows(rows: Dict[str, List[Cell]], baseline: str, path: str) -> None:
    """AP of every row: a dot per seed, and the mean.

    Args:
        rows: the cells of every row, by label, drawn from the top.
        baseline: label of the row whose mean is a line through all of them, if it is there.
        path: of the PNG.
    """
    figure = Figure(figsize=(7, 1 + 0.35 * len(rows)))
    axes = figure.subplots()
    if baseline in rows:
        axes.axvline(_mean(rows[baseline]), color="0.6", linestyle="--", linewidth=1)
    for y, cells in enumerate(rows.values()):
        axes.plot([c.results["AP"] for c in cells], [y] * len(cells), "o", color="C0", alpha=0.5)
        axes.plot([_mean(cells)] * 2, [y - 0.3, y + 0.3], color="C0", linewidth=2)
        axes.annotate(
            f"{_mean(cells):.1f}", (1.01, y), xycoords=("axes fraction", "data"), va="center"
        )
    axes.set_yticks(range(len(rows)), list(map(as_label, rows)))
    axes.set(xlabel="AP, a dot per seed", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    with atomic_write(path, "wb") as f:
        figure.savefig(f, dpi=110, format="png")


def _mean(cells: List[Cell]) -> float:
    return float(np.mean([cell.results["AP"] for cell in cells]))

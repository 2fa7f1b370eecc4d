#!/usr/bin/env python
"""Writes the tables of docs/results.md, and its figures, from the runs in docs/results.

python tools/results_page.py
python tools/results_page.py --check

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, its runs in
docs/results/NAME.json: the ``cells.json`` of a ``d2kd compare``. With ``--check`` nothing is
written; the exit status tells whether the page is up to date.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Dict, List, Tuple

import matplotlib
import numpy as np

from d2kd.evidence.cells import Cell, by_label, read_cells
from d2kd.evidence.tables import table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs/results.md", ROOT / "docs/results"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->\n)", flags=re.DOTALL)
AFTER = re.compile(r"(.+), teacher after (\d+)")


def page(text: str) -> str:
    """The page with its tables made anew."""
    return TABLE.sub(lambda m: f"{m[1]}{section(m[2])}{m[3]}", text)


def section(name: str) -> str:
    """A table, and where its numbers come from.

    Raises:
        ValueError: if rows that are compared come from several commits or machines.
    """
    cells = read_cells(str(RESULTS / f"{name}.json"))
    rows = by_label(cells)
    text = table(rows, baseline=next(iter(rows)), costs=False)
    return f"{text}\n\n{origin(name, cells)}\n"


def origin(name: str, cells: List[Cell]) -> str:
    """One line: seeds, commit, machine."""
    keys = ("commit", "processor", "threads", "torch", "detectron2")
    found = {tuple(cell.made_with[key] for key in keys) for cell in cells}
    if len(found) > 1:
        raise ValueError(f"{name}: its runs are of several commits or machines: {found}")
    commit, processor, threads, torch, detectron2 = found.pop()
    seeds = sorted({cell.seed for cell in cells})
    return (
        f"{_plural('Seed', len(seeds))} {', '.join(map(str, seeds))}; commit {commit[:7]}, "
        f"{processor}, {threads} {_plural('thread', threads)} per run, torch {torch}, "
        f"Detectron2 {detectron2}; every run in [{name}.json](results/{name}.json)."
    )


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def draw_teachers(name: str, teacher_aps: Dict[str, float], path: Path) -> None:
    """AP of students over that of their teachers, with the plain student as a line.

    Args:
        name: of an experiment whose rows are called "<method>, teacher after <iterations>".
        teacher_aps: AP of the teachers, by iterations.
        path: of the PNG.
    """
    rows = by_label(read_cells(str(RESULTS / f"{name}.json")))
    figure, axes = plt.subplots(figsize=(7, 4))
    for label, points in curves(rows, teacher_aps).items():
        x, means, deviations = zip(*points)
        axes.errorbar(x, means, deviations, marker="o", capsize=3, label=label)
    plain = [cell.results["AP"] for cell in next(iter(rows.values()))]
    axes.axhline(np.mean(plain), color="0.5", linestyle="--", label="plain student")
    axes.set(xlabel="AP of the teacher", ylabel="AP of the student, mean and deviation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curves(
    rows: Dict[str, List[Cell]], teacher_aps: Dict[str, float]
) -> Dict[str, List[Tuple[float, float, float]]]:
    """(AP of the teacher, mean, deviation) of every row with a teacher, by method."""
    found: Dict[str, List[Tuple[float, float, float]]] = {}
    for label, cells in rows.items():
        match = AFTER.fullmatch(label)
        if match:
            aps = [cell.results["AP"] for cell in cells]
            point = (teacher_aps[match[2]], float(np.mean(aps)), float(np.std(aps, ddof=1)))
            found.setdefault(match[1], []).append(point)
    return {method: sorted(points) for method, points in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only tell whether it is up to date")
    args = parser.parse_args()
    before = PAGE.read_text()
    text = page(before)
    if args.check:
        sys.exit(f"{PAGE} is not up to date: run {__file__}" if text != before else 0)
    PAGE.write_text(text)
    for name, aps in json.loads((RESULTS / "teachers.json").read_text()).items():
        draw_teachers(name, aps, ROOT / f"docs/images/{name}.png")


if __name__ == "__main__":
    main()

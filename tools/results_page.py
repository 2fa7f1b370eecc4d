#!/usr/bin/env python
"""Writes the tables of docs/results.md, and its figures, from the runs in docs/results.

python tools/results_page.py
python tools/results_page.py --check

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, its runs in
docs/results/NAME.json: the ``cells.json`` of a ``d2kd compare``. ``<!-- equal time: DETECTOR,
NAME -->`` sets the rows of NAME.json beside the plain student of longer_DETECTOR.json that trained
for as long, by the costs of a step in step_costs.json. With ``--check`` nothing is written; the
exit status tells whether the page is up to date.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Dict, List, Tuple

import matplotlib
import numpy as np
from tabulate import tabulate

from d2kd.evidence.cells import Cell, by_label, read_cells
from d2kd.evidence.tables import mean_and_deviation, table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs/results.md", ROOT / "docs/results"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->\n)", flags=re.DOTALL)
EQUAL_TIME = re.compile(
    r"(<!-- equal time: (\w+), (\w+) -->\n).*?(<!-- end -->\n)", flags=re.DOTALL
)
LONGER = re.compile(r"([\d.]+) times as long")
AFTER = re.compile(r"(.+), teacher after (\d+)")


def page(text: str) -> str:
    """The page with its tables made anew."""
    text = TABLE.sub(lambda m: f"{m[1]}{section(m[2])}{m[3]}", text)
    return EQUAL_TIME.sub(lambda m: f"{m[1]}{equal_time(m[2], m[3])}{m[4]}", text)


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


def equal_time(detector: str, name: str) -> str:
    """A table of the methods that were trained with all seeds of the longer trainings, beside the
    plain student that is trained for the time that they take.

    Args:
        detector: whose longer trainings and costs of a step are read.
        name: of the experiment with the methods.

    Raises:
        ValueError: if the two kinds of runs come from several commits or machines.
    """
    methods, longer = (
        read_cells(str(RESULTS / f"{file}.json")) for file in (name, f"longer_{detector}")
    )
    origin(name, methods + longer)
    plain = plain_over_time(longer)
    costs = json.loads((RESULTS / "step_costs.json").read_text())[detector]
    body = []
    for label, cells in by_label(methods).items():
        method = label.partition(",")[0]
        cells = [cell for cell in cells if cell.seed in plain]
        if method not in costs or len(cells) < len(plain):
            continue
        at_equal_time = [float(np.interp(costs[method], *plain[cell.seed])) for cell in cells]
        aps = [cell.results["AP"] for cell in cells]
        longest = max(plain[cells[0].seed][0])
        above = "> " if costs[method] > longest else ""  # the plain student has yet more time
        below = "< " if above else ""
        difference = mean_and_deviation([a - b for a, b in zip(aps, at_equal_time)], "+")
        row = [label, f"{costs[method]:.2f}", mean_and_deviation(aps)]
        body.append([*row, f"{above}{mean_and_deviation(at_equal_time)}", f"{below}{difference}"])
    headers = ["", "time of a step", "AP", "AP of the plain student in that time", "difference"]
    return tabulate(body, headers, tablefmt="github", disable_numparse=True) + "\n"


def plain_over_time(cells: List[Cell]) -> Dict[int, Tuple[List[float], List[float]]]:
    """By seed, how long the plain student was trained, in parts of the shortest run, and its AP.

    Args:
        cells: of a baseline, and of rows called "<number> times as long".
    """
    found: Dict[int, List[Tuple[float, float]]] = {}
    for cell in cells:
        match = LONGER.fullmatch(cell.label)
        length = float(match[1]) if match else 1.0
        found.setdefault(cell.seed, []).append((length, cell.results["AP"]))
    return {seed: tuple(map(list, zip(*sorted(points)))) for seed, points in found.items()}


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

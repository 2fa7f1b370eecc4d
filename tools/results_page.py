#!/usr/bin/env python
"""Writes the tables of measured results, and their figures, from the runs in docs/results.

python tools/results_page.py
python tools/results_page.py --check

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` of a page, its runs in
docs/results/NAME.json: the ``cells.json`` of a ``d2kd compare``. ``<!-- equal time: DETECTOR,
NAME -->`` sets the rows of NAME.json beside the plain student that trained for as long, by the
costs of a step in step_costs.json; the longer trainings are rows of NAME.json, or of
longer_DETECTOR.json. ``<!-- matrix: gains -->`` and ``<!-- matrix: equal time -->`` set all methods
on all detectors side by side. With ``--check`` nothing is written; the exit status tells whether
the pages are up to date.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Set, Tuple

import matplotlib
import numpy as np
from tabulate import tabulate

from d2kd.comparison.cells import Cell, by_label, read_cells
from d2kd.comparison.tables import difference, gain, mean_and_deviation, table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Curve = Tuple[List[float], List[float]]  # lengths of training, APs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results"
PAGES = [ROOT / "docs/results.md", ROOT / "docs/choosing.md", *sorted(RESULTS.glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->\n)", flags=re.DOTALL)
EQUAL_TIME = re.compile(
    r"(<!-- equal time: (\w+), (\w+) -->\n).*?(<!-- end -->\n)", flags=re.DOTALL
)
MATRIX = re.compile(r"(<!-- matrix: ([\w ]+) -->\n).*?(<!-- end -->\n)", flags=re.DOTALL)
LONGER = re.compile(r"([\d.]+) times as long")
AFTER = re.compile(r"(.+), teacher after (\d+)")

# What runs with one seed have in common: each gain is a difference between two of them
MADE_WITH = ("commit", "processor", "threads", "torch", "detectron2")
# Columns and rows of the matrix, the rows with their name in step_costs.json and their experiments;
# of a method that was measured on equal terms twice, the later experiment counts
METHODS = ("CrossKD", "mimicking", "LD", "DeFeat", "FRS", "HGD", "PKD", "MGD", "G-DetKD")
DETECTORS = {
    "RetinaNet": ("retinanet", ("methods_retinanet", "levels_retinanet")),
    "FCOS": ("fcos", ("methods_fcos", "levels_fcos")),
    "PaperFCOS": ("paper_fcos", ("methods_paper_fcos",)),
    "ATSS": ("atss", ("methods_atss",)),
    "GFL": ("gfl", ("methods_gfl",)),
    "Faster R-CNN": ("faster_rcnn", ("methods_faster_rcnn",)),
    "Mask R-CNN": ("mask_rcnn", ("methods_mask_rcnn",)),
    "RetinaNet, of a Faster R-CNN": ("heterogeneous_retinanet", ("heterogeneous_retinanet",)),
    "FCOS, of a Faster R-CNN": ("heterogeneous_fcos", ("heterogeneous_fcos",)),
    "ATSS, of a Faster R-CNN": ("heterogeneous_atss", ("heterogeneous_atss",)),
    "GFL, of a Faster R-CNN": ("heterogeneous_gfl", ("heterogeneous_gfl",)),
    "RetinaNet, pretrained": ("retinanet", ("pretrained_retinanet",)),
}
# Where a search preferred a share of 2, its row follows that of 8.
# G-DetKD was worse with the weights that `d2kd balance` proposes.
EQUAL_TERMS = re.compile(r"(?!G-DetKD)(.+), (?:share [28]|P3 to P5)|(G-DetKD), published")


def page(text: str, folder: Path) -> str:
    """A page with its tables made anew.

    Args:
        text: of the page.
        folder: that it stands in.
    """
    text = TABLE.sub(lambda m: f"{m[1]}{section(m[2], folder)}{m[3]}", text)
    text = EQUAL_TIME.sub(lambda m: f"{m[1]}{equal_time(m[2], m[3])}{m[4]}", text)
    return MATRIX.sub(lambda m: f"{m[1]}{matrix(m[2])}{m[3]}", text)


def section(name: str, folder: Path) -> str:
    """A table, and where its numbers come from.

    Args:
        name: of the experiment.
        folder: of the page.

    Raises:
        ValueError: if runs with one seed come from several commits or machines.
    """
    cells = read_runs(name)
    rows = by_label(cells)
    text = table(rows, baseline=next(iter(rows)), costs=False)
    path = os.path.relpath(RESULTS / f"{name}.json", folder)
    return f"{text}\n\n{origin(name, cells)}; every run in [{name}.json]({path}).\n"


def origin(name: str, cells: List[Cell]) -> str:
    """Seeds, commit and machine, in words.

    Raises:
        ValueError: if runs with one seed, which are compared, are of several commits or machines.
    """
    seeds: Dict[tuple, Set[int]] = {}
    for cell in cells:
        seeds.setdefault(tuple(cell.made_with[key] for key in MADE_WITH), set()).add(cell.seed)
    if len(set().union(*seeds.values())) < sum(map(len, seeds.values())):
        raise ValueError(f"{name}: runs with one seed are of several commits or machines: {seeds}")
    text = "; ".join(
        f"{_plural('seed', len(of))} {', '.join(map(str, sorted(of)))}: commit {commit[:7]}, "
        f"{processor}, {threads} {_plural('thread', threads)} per run, torch {torch}, "
        f"Detectron2 {detectron2}"
        for (commit, processor, threads, torch, detectron2), of in seeds.items()
    )
    return text[0].upper() + text[1:]


def equal_time(detector: str, name: str) -> str:
    """A table of the methods beside the plain student that is trained for the time that they take,
    at the seeds that both were trained with. Where the plain student has several, a method needs
    two.

    Args:
        detector: whose costs of a step are read, and longer trainings.
        name: of the experiment with the methods.

    Raises:
        ValueError: if the two kinds of runs come from several commits or machines.
    """
    costs, plain = step_costs(detector), plain_over_time(detector, name)
    body = []
    for label, cells in by_label(read_runs(name)).items():
        method = label.rpartition(", ")[0] or label
        cells = comparable(cells, costs.get(method, 0.0), plain)
        if method not in costs or len(cells) < min(2, len(plain)):
            continue
        aps = mean_and_deviation([cell.results["AP"] for cell in cells])
        beside = beside_plain(cells, costs[method], plain)
        body.append([label, f"{costs[method]:.2f}", aps, beside.plain, beside.difference])
    headers = ["", "time of a step", "AP", "AP of the plain student in that time", "difference"]
    return _markdown(body, headers)


def comparable(cells: List[Cell], cost: float, plain: Dict[int, Curve]) -> List[Cell]:
    """Those of seeds whose plain student was trained for as long; if it was for none, of all seeds
    that it has."""
    known = [cell for cell in cells if cell.seed in plain]
    return [cell for cell in known if cost <= max(plain[cell.seed][0])] or known


class Beside(NamedTuple):
    """A method beside the plain student that trains for as long, means and deviations in words."""

    plain: str  # its AP; "> 50.0" where it was not trained for as long
    difference: str  # of the method's AP from it


def beside_plain(cells: List[Cell], cost: float, plain: Dict[int, Curve]) -> Beside:
    """What a method is worth in equal time, interpolated linearly between lengths of training.

    Args:
        cells: of one row, with seeds of the plain student.
        cost: of one step, in plain ones.
        plain: by seed, see :func:`plain_over_time`.
    """
    at_equal_time = [float(np.interp(cost, *plain[cell.seed])) for cell in cells]
    differences = [cell.results["AP"] - ap for cell, ap in zip(cells, at_equal_time)]
    longest = max(plain[cells[0].seed][0])
    above, below = ("> ", "< ") if cost > longest else ("", "")  # plain has yet more time
    return Beside(above + mean_and_deviation(at_equal_time), below + difference(differences))


def plain_over_time(detector: str, name: str) -> Dict[int, Curve]:
    """By seed, how long the plain student was trained, relative to the shortest run, and its AP.

    Args:
        detector, name: of the experiment that it is set beside. Rows called "<number> times as
            long" are its own, or those of longer_DETECTOR, or of the experiment of that name.

    Raises:
        ValueError: if experiment and longer trainings come from several commits or machines.
    """
    cells = read_runs(name)
    if not any(LONGER.fullmatch(cell.label) for cell in cells):
        beside = f"longer_{detector}"
        longer = read_runs(beside if (RESULTS / f"{beside}.json").is_file() else detector)
        origin(name, cells + longer)
        cells = longer
    found: Dict[int, List[Tuple[float, float]]] = {}
    for cell in cells:
        match = LONGER.fullmatch(cell.label)
        if match or cell.label == cells[0].label:
            length = float(match[1]) if match else 1.0
            found.setdefault(cell.seed, []).append((length, cell.results["AP"]))
    return {seed: tuple(map(list, zip(*sorted(points)))) for seed, points in found.items()}


def step_costs(detector: str) -> Dict[str, float]:
    """What a step with each method costs, in plain ones."""
    return json.loads((RESULTS / "step_costs.json").read_text()).get(detector, {})


def read_runs(name: str) -> List[Cell]:
    """Of an experiment."""
    return read_cells(str(RESULTS / f"{name}.json"))


def matrix(kind: str) -> str:
    """A table of all methods on all detectors, each on equal terms.

    Args:
        kind: "gains" over the plain student of as many iterations, or differences from the one of
            "equal time".
    """
    body = []
    for detector, (short, names) in DETECTORS.items():
        plain = next(iter(by_label(read_runs(names[0])).values()))
        aps = mean_and_deviation([cell.results["AP"] for cell in plain])
        entries = matrix_row(short, names, equal_time=kind == "equal time")
        if entries:  # in equal time, those whose steps were timed
            body.append([detector, aps, *(entries.get(method, "") for method in METHODS)])
    return _markdown(body, ["student", "AP alone", *METHODS])


def matrix_row(detector: str, names: Sequence[str], equal_time: bool) -> Dict[str, str]:
    """The entries of one detector, by method.

    Args:
        detector: in step_costs.json.
        names: of its experiments.
        equal_time: differences from the plain student that trains for as long, not gains.
    """
    costs, found = step_costs(detector), {}
    for name in names:
        rows = by_label(read_runs(name))
        plain = next(iter(rows.values()))
        for match in filter(None, map(EQUAL_TERMS.fullmatch, rows)):
            label, method = match[0], match[1] or match[2]
            if not equal_time:
                found[method] = gain(rows[label], plain)
            elif method in costs:
                over_time = plain_over_time(detector, name)
                cells = comparable(rows[label], costs[method], over_time)
                found[method] = beside_plain(cells, costs[method], over_time).difference
    return found


def _markdown(body: List[List[str]], headers: List[str]) -> str:
    return tabulate(body, headers, tablefmt="github", disable_numparse=True) + "\n"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def draw_teachers(name: str, teacher_aps: Dict[str, float], path: Path) -> None:
    """AP of students over that of their teachers, with the plain student as a line.

    Args:
        name: of an experiment whose rows are called "<method>, teacher after <iterations>".
        teacher_aps: AP of the teachers, by iterations.
        path: of the PNG.
    """
    rows = by_label(read_runs(name))
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
    before = {path: path.read_text() for path in PAGES}
    after = {path: page(text, path.parent) for path, text in before.items()}
    if args.check:
        old = [str(path) for path in PAGES if after[path] != before[path]]
        sys.exit(f"{' and '.join(old)}: not up to date, run {__file__}" if old else 0)
    for path, text in after.items():
        path.write_text(text)
    for name, aps in json.loads((RESULTS / "teachers.json").read_text()).items():
        draw_teachers(name, aps, ROOT / f"docs/images/{name}.png")


if __name__ == "__main__":
    main()

"""Finished runs as data: what tables and figures are made of, and ``docs/results`` keeps."""

import json
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from d2kd.config import read_config
from d2kd.distillation import million_parameters, student_on_meta
from d2kd.engine.versions import recorded_versions
from d2kd.lazy import python_overrides
from d2kd.model_zoo import config_name
from d2kd.writing import atomic_write

from .rows import Row
from .runs import Run

# Of what a run was made with, what may change its numbers
MADE_WITH = (
    "commit",
    "d2kd",
    "detectron2",
    "torch",
    "torchvision",
    "python",
    "processor",
    "threads",
    "gpu",
    "started",
)


class Cell(NamedTuple):
    """A finished run of one row with one seed."""

    label: str  # of the row
    config: str  # a recipe's name, or a path
    opts: List[str]  # what the row and the command line change in it, KEY VALUE ...
    seed: int
    results: Dict[str, float]  # AP, AP50 and AP75 of the last evaluation
    # Of training, evaluations included; 0 if it was not trained, None if in several parts
    seconds: Optional[float]
    parameters: float  # of the student, in millions
    made_with: Dict[str, Any]  # commit, versions, processor, threads: see MADE_WITH


def cell_of(label: str, row: Row, seed: int, run: Run, opts: Sequence[str] = ()) -> Cell:
    """What a finished run left.

    Args:
        label: of the row in its table.
        row, seed, run: what was trained, and how it came out.
        opts: overrides beside the row's, KEY VALUE ...
    """
    opts = [*row.opts, *opts]
    return Cell(
        label=label,
        config=config_name(row.config),
        opts=list(opts),
        seed=seed,
        results=run.results,
        seconds=run.seconds,
        parameters=parameters(row.config, python_overrides(row.config, opts)),
        made_with=_made_with(recorded_versions(run.folder)),
    )


def _made_with(starts: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """Of the first start of a run; where a later one had something else, both in words."""
    found = {}
    for key in MADE_WITH:
        values = list(dict.fromkeys(start[key] for start in starts if key in start))
        if key == "started":
            values = values[:1]
        if values:
            found[key] = values[0] if len(values) == 1 else ", then ".join(map(str, values))
    return found


def parameters(config_file: str, opts: Sequence = ()) -> float:
    """Millions of parameters of the student that a config describes."""
    return million_parameters(student_on_meta(read_config(config_file, opts)))


def by_label(cells: Sequence[Cell]) -> Dict[str, List[Cell]]:
    """The cells of every row, rows in order of their first cell, cells in order of their seeds."""
    rows: Dict[str, List[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.label, []).append(cell)
    return {label: sorted(row, key=lambda cell: cell.seed) for label, row in rows.items()}


def write_cells(cells: Sequence[Cell], path: str) -> None:
    """As JSON; the folder is made if need be."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_write(path) as f:
        json.dump([cell._asdict() for cell in cells], f, indent=1)
        f.write("\n")


def read_cells(path: str) -> List[Cell]:
    """What :func:`write_cells` wrote."""
    with open(path) as f:
        return [Cell(**entry) for entry in json.load(f)]

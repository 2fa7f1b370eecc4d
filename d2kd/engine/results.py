"""Results of evaluations: as a person reads them, and from the metrics that a run left."""

from typing import List, Mapping, Optional, Sequence, Tuple

from tabulate import tabulate

METRICS = ("AP", "AP50", "AP75")  # of an evaluation, those that are compared and shown
PER_CLASS = "AP-"  # what Detectron2 calls the AP of a class, followed by its name
_CLASSES_PER_ROW = 4
# As many as are shown; a table of 1203 classes is for the file
_MAX_CLASSES = 100


def evaluated(names: Sequence[str], results: Mapping) -> str:
    """
    Args:
        names: of the data sets.
        results: as from Detectron2's ``DefaultTrainer.test``: by task, of several data sets by data
            set first.

    Returns:
        a line per task, and a table of the classes.
    """
    by_set = results if len(names) > 1 else dict.fromkeys(names, results)
    return "\n".join(
        _task(name, task, values)
        for name, tasks in by_set.items()
        for task, values in tasks.items()
        if isinstance(values, Mapping)
    )


def _task(name: str, task: str, values: Mapping[str, float]) -> str:
    total = {k: v for k, v in values.items() if not k.startswith(PER_CLASS)}
    classes = {k[len(PER_CLASS) :]: v for k, v in values.items() if k.startswith(PER_CLASS)}
    line = f"{task} on {name}: " + "  ".join(f"{k} {v:.2f}" for k, v in total.items())
    if not 0 < len(classes) <= _MAX_CLASSES:
        return line
    return f"{line}\n{_class_table(classes)}"


def _class_table(classes: Mapping[str, float]) -> str:
    cells = [cell for name, ap in classes.items() for cell in (f"AP {name}", f"{ap:.2f}")]
    step = 2 * _CLASSES_PER_ROW
    rows = [cells[i : i + step] for i in range(0, len(cells), step)]
    sides = ("left", "right") * (len(rows[0]) // 2)
    return tabulate(rows, tablefmt="plain", colalign=sides, disable_numparse=True)


def history_of(
    metric: str, lines: Sequence[Mapping[str, float]], max_iter: int
) -> List[Tuple[int, float]]:
    """(steps done, value) of every evaluation.

    Args:
        metric: such as ``bbox/AP``.
        lines: from :func:`~d2kd.engine.metrics.read_metrics`.
        max_iter: steps of the whole run.
    """
    # Iterations count from 0; the evaluation after the last one is logged as one more.
    return [
        (min(int(line["iteration"]) + 1, max_iter), line[metric])
        for line in lines
        if metric in line
    ]


def best_of(history: Sequence[Tuple[int, float]]) -> Optional[Tuple[int, float]]:
    """The first of the highest values; None if there is no number."""
    numbers = [(step, value) for step, value in history if value == value]
    return max(numbers, key=lambda entry: (entry[1], -entry[0]), default=None)

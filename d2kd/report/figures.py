"""Figures of a page, as files within the page."""

import base64
import io
from typing import Dict, List, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2kd.labels import as_label

from .facts import RunFacts

_COLUMNS = 3
_SIZE = (4.2, 2.9)  # of a small one, in inches
_BASELINE = {"color": "0.45", "linestyle": "--"}
_MAX_BARS = 40  # classes; of more only the table is shown


def svg(figure: Figure) -> str:
    """A figure of lines as a data address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def loss_curves(runs: Sequence[RunFacts]) -> str:
    """One plot per loss; of a distillation loss with its weight over time, dotted."""
    losses = list(dict.fromkeys(name for facts in runs for name in facts.losses))
    figure, plots = _grid(len(losses))
    for axes, loss in zip(plots, losses):
        axes.set_title(loss[len("loss_") :], fontsize=10)
        for facts in runs:
            axes.plot(*facts.scalar(loss), **_style(runs, facts), linewidth=1)
        _add_weights(axes, loss, runs)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("iteration", fontsize=8)
    _legend(figure, runs)
    return svg(figure)


def _add_weights(axes: Axes, loss: str, runs: Sequence[RunFacts]) -> None:
    weighted = [facts for facts in runs if facts.weight_of(loss)]
    if not weighted:
        return
    twin = axes.twinx()
    for facts in weighted:
        style = {**_style(runs, facts), "linestyle": ":", "label": None}
        twin.plot(*facts.scalar(facts.weight_of(loss)), **style)
    twin.set_ylim(bottom=0)
    twin.set_ylabel("weight (dotted)", fontsize=8)
    twin.tick_params(labelsize=8)


def ap_curves(runs: Sequence[RunFacts], tasks: Sequence[str]) -> str:
    """AP over time, a plot per task."""
    figure, plots = _grid(len(tasks), size=(6.5, 3.6), columns=2)
    for axes, task in zip(plots, tasks):
        axes.set_title(f"{task} AP", fontsize=10)
        for facts in runs:
            history = facts.history(f"{task}/AP")
            steps, values = [s for s, _ in history], [v for _, v in history]
            axes.plot(steps, values, **_style(runs, facts), marker=".")
        axes.set_xlabel("iterations done", fontsize=8)
        axes.set_ylim(bottom=0)
    _legend(figure, runs)
    return svg(figure)


def class_bars(runs: Sequence[RunFacts], task: str) -> str:
    """The AP of every class, runs side by side; "" for too many classes, or none."""
    tables: List[Dict[str, float]] = [facts.class_ap(task) for facts in runs]
    classes = list(dict.fromkeys(name for table in tables for name in table))
    if not 0 < len(classes) <= _MAX_BARS:
        return ""
    figure = Figure(figsize=(max(5.0, 0.25 * len(classes) * (len(runs) + 1)), 3.2))
    axes = figure.subplots()
    width = 0.8 / len(runs)
    for i, (facts, table) in enumerate(zip(runs, tables)):
        color = _style(runs, facts)["color"]
        heights = [table.get(name, np.nan) for name in classes]
        axes.bar(
            np.arange(len(classes)) + i * width,
            heights,
            width,
            color=color,
            label=as_label(facts.name),
        )
    names = list(map(as_label, classes))
    axes.set_xticks(np.arange(len(classes)) + 0.4 - width / 2, names, rotation=45, ha="right")
    axes.set_ylabel(f"{task} AP")
    axes.legend(fontsize=8)
    return svg(figure)


def _grid(number: int, size=_SIZE, columns: int = _COLUMNS):
    """A figure with as many plots as asked, in rows."""
    columns = max(min(columns, number), 1)
    rows = max(-(-number // columns), 1)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    plots = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in plots:
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    for axes in plots[number:]:
        axes.set_visible(False)
    return figure, plots[:number]


def _style(runs: Sequence[RunFacts], facts: RunFacts) -> Dict:
    if facts.is_baseline:
        return {**_BASELINE, "label": as_label(facts.name)}
    others = [f for f in runs if not f.is_baseline]
    return {"color": f"C{others.index(facts) % 10}", "label": as_label(facts.name)}


def _legend(figure: Figure, runs: Sequence[RunFacts]) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(runs), 4), fontsize=9)

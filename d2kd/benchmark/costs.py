"""The tables of what was measured: for the screen, for documents, and as data."""

import json
import math
import os
import statistics
from typing import Dict, List, Sequence

import numpy as np
from tabulate import tabulate

from d2kd.errors import UserError, reason
from d2kd.writing import atomic_write

from .measuring import PARTS, STANDARD_PARTS, Case, Costs, Load

HEADERS = ["recipe", "c/a", "c/(a+b)", "c/(a+b) in FLOPs", "rebuilt/b", "memory c/a"]
HEADERS += ["host syncs of c, of a"]


def _ratios(costs: Costs, part: str, to: str) -> List[float]:
    """The time of one part to that of others, such as "ab", in every round; smallest first."""
    others = zip(*(costs.seconds[name] for name in to))
    return sorted(x / sum(y) for x, y in zip(costs.seconds[part], others))


def ratio(costs: Costs, part: str, to: str) -> float:
    """The median over the rounds of the time of one part to that of others, such as "ab"."""
    return statistics.median(_ratios(costs, part, to))


def quartile_spread(costs: Costs, part: str, to: str) -> float:
    """Half the distance of the quartiles of the same ratio."""
    ratios = _ratios(costs, part, to)
    if len(ratios) < 4:
        return (ratios[-1] - ratios[0]) / 2
    quartiles = statistics.quantiles(ratios, n=4)
    return (quartiles[2] - quartiles[0]) / 2


def _with_spread(costs: Costs, part: str, to: str, digits: int) -> str:
    median, spread = ratio(costs, part, to), quartile_spread(costs, part, to)
    return f"{median:.{digits}f} ± {spread:.{digits}f}"


def flops_ratio(costs: Costs) -> float:
    """c/(a+b) in FLOPs instead of in seconds."""
    return costs.gflops["c"] / (costs.gflops["a"] + costs.gflops["b"])


def costs_text(costs: Costs, most_operations: int = 0) -> str:
    """
    Args:
        costs: what was measured.
        most_operations: how many operations to list, those of the most time first.

    Returns:
        tables of seconds and memory, and the ratios, medians over the rounds.
    """
    load = costs.load
    rows = []
    for name, seconds in costs.seconds.items():
        memory = f"{costs.memory[name]:.0f}" if name in costs.memory else ""
        part = f"{name}: {PARTS[name]}" if name in PARTS else name
        rows.append([part, f"{statistics.median(seconds):.3f}", memory])
    amp = ", mixed precision" if load.amp else ", float32"
    lines = [
        f"{' '.join([costs.case.recipe, *costs.case.opts])}",
        f"{costs.device}, torch {costs.torch}, {load.batch} x {load.size}²{amp}",
        _table(rows, ["", "seconds", "peak MiB"]),
        f"c/a     {_with_spread(costs, 'c', 'a', 3)}",
    ]
    for name in costs.seconds:
        if name.startswith("c"):
            lines.append(f"c/(a+b) {_with_spread(costs, name, 'ab', 3)}{name[1:]}")
    lines.append(f"        {flops_ratio(costs):.3f} in FLOPs")
    lines.append(f"teacher {_with_spread(costs, 't', 'b', 3)} of b")
    lines.append(f"memory c/a {costs.memory['c'] / costs.memory['a']:.3f}")
    if not costs.on_cpu:
        lines.append(f"host syncs {costs.syncs['c']} in c, {costs.syncs['a']} in a")
    if costs.operations:
        listed = [*costs.operations.items()][:most_operations]
        listed_rows = [[name, f"{ms:.1f}"] for name, ms in listed]
        lines += ["", _table(listed_rows, ["operation", "ms in c - a - b"])]
    return "\n".join(lines)


def costs_markdown(all_costs: Sequence[Costs]) -> str:
    """One row per recipe, as in docs/speed.md."""
    rows = []
    for costs in all_costs:
        to_student, to_both, of_teacher = (
            _with_spread(costs, *of, 2) for of in (("c", "a"), ("c", "ab"), ("t", "b"))
        )
        ratios = [to_student, to_both, f"{flops_ratio(costs):.2f}", of_teacher]
        memory = f"{costs.memory['c'] / costs.memory['a']:.2f}"
        syncs = "" if costs.on_cpu else f"{costs.syncs['c']}, {costs.syncs['a']}"
        label = f", {costs.case.label}" if costs.case.label else ""
        rows.append([f"`{costs.case.recipe}`{label}", *ratios, memory, syncs])
    without = None if any(row[-1] for row in rows) else -1
    return _table([row[:without] for row in rows], HEADERS[:without])


def growth_text(key: str, values: Sequence[str], all_costs: Sequence[Costs]) -> str:
    """How seconds and memory grow with a load or a config key. A slope of 1 is growth in
    proportion, 0 is none."""
    rows, numbers = [], {name: [] for name in STANDARD_PARTS}
    for value, costs in zip(values, all_costs):
        medians = {name: statistics.median(costs.seconds[name]) for name in numbers}
        for name in numbers:
            numbers[name].append(medians[name])
        cells = [f"{x:.3f}" for x in medians.values()]
        peak = f"{costs.memory['c']:.0f}"
        rows.append([value, *cells, f"{ratio(costs, 'c', 'ab'):.3f}", peak])
    table = _table(rows, [key, "a", "b", "c", "c/(a+b)", "peak MiB of c"])
    try:
        slopes = {name: _slope([float(x) for x in values], y) for name, y in numbers.items()}
    except ValueError:  # values that are no numbers, or not above 0
        return table
    return f"{table}\nslopes: " + ", ".join(f"{k} {v:.2f}" for k, v in slopes.items())


def _slope(x: List[float], y: List[float]) -> float:
    """Of log y over log x, by least squares."""
    return float(np.polyfit([math.log(v) for v in x], [math.log(v) for v in y], deg=1)[0])


def read_costs(path: str) -> List[Costs]:
    """What :func:`write_costs` wrote; none if there is no such file.

    Raises:
        UserError: if the file holds something else.
    """
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as f:
            entries: List[Dict] = json.load(f)
        if not isinstance(entries, list):
            raise TypeError("it holds no list")
        return [_costs_of(entry) for entry in entries]
    except (ValueError, TypeError, LookupError, RecursionError) as e:
        raise UserError(
            f"{path} is not what d2kd benchmark writes ({reason(e)}): give another file"
        ) from e


def _costs_of(entry: Dict) -> Costs:
    return Costs(
        **{
            **entry,
            "case": Case(**{**entry["case"], "opts": tuple(entry["case"]["opts"])}),
            "load": Load(**entry["load"]),
            "methods": tuple(entry["methods"]),
        }
    )


def write_costs(all_costs: Sequence[Costs], path: str) -> None:
    """As JSON; the file that was there stays until the new one is complete."""
    entries = [
        {**c._asdict(), "case": c.case._asdict(), "load": c.load._asdict()} for c in all_costs
    ]
    with atomic_write(path) as f:
        json.dump(entries, f, indent=1)


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, "github", disable_numparse=True)

"""What a page needs to know of a run, from the files in its folder."""

import os
from functools import cached_property
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode

from d2kd.checkpoint import BEST_WEIGHTS, EMA_WEIGHTS, checkpoint_names
from d2kd.data.described import register_described
from d2kd.engine.metrics import newest_line, read_metrics
from d2kd.engine.progress import TIMED_PARTS, split_time
from d2kd.engine.results import PER_CLASS, best_of, history_of
from d2kd.engine.scaling import scale_to_processes
from d2kd.engine.trained_run import TrainedRun
from d2kd.engine.versions import recorded_versions

# Tasks of Detectron2's evaluators, in the order in which they are told
_TASKS = ("bbox", "segm", "keypoints")


class RunFacts:
    """A run as a page shows it.

    Attributes:
        run: where it is.
        name: what it is called on the page.
        is_baseline: whether the others are compared with it.
        cfg: its config, its data sets registered.
        lines: of its metrics.
    """

    def __init__(self, run: TrainedRun, name: str, is_baseline: bool = False):
        self.run, self.name, self.is_baseline = run, name, is_baseline
        self.cfg: CfgNode = run.config()
        register_described(self.cfg)
        self.lines = read_metrics(run.folder, self.cfg.DATASETS.TEST)

    @property
    def methods(self) -> List[str]:
        """The methods that it distilled with; none is a plain run."""
        return list(self.cfg.DISTILL.METHODS)

    @cached_property
    def tasks(self) -> List[str]:
        """The tasks that it was evaluated on, such as "bbox"."""
        return [t for t in _TASKS if any(f"{t}/AP" in line for line in self.lines)]

    def history(self, metric: str) -> List[Tuple[int, float]]:
        """(steps done, value) of every evaluation."""
        return history_of(metric, self.lines, self.max_iter)

    @cached_property
    def max_iter(self) -> int:
        """The steps that it was to have."""
        processes = next((start["processes"] for start in self.starts if "processes" in start), 1)
        return scale_to_processes(self.cfg, processes).SOLVER.MAX_ITER

    def state(self, metric: str) -> str:
        """How far a run had come in its last evaluation; "" if to the end."""
        steps = max((steps for steps, _ in self.history(metric)), default=self.max_iter)
        unfinished = steps < self.max_iter
        return f", after {steps} of {self.max_iter} iterations" if unfinished else ""

    def last(self, metric: str) -> Optional[float]:
        """The value of the last evaluation, if there was one."""
        history = self.history(metric)
        return history[-1][1] if history else None

    def best(self, metric: str) -> Optional[Tuple[int, float]]:
        """(steps done, value) of the best evaluation, if there was one."""
        return best_of(self.history(metric))

    def class_ap(self, task: str) -> Dict[str, float]:
        """The AP of every class in the last evaluation, by name."""
        prefix = f"{task}/{PER_CLASS}"
        last = newest_line(line for line in self.lines if f"{task}/AP" in line)
        return {k[len(prefix) :]: v for k, v in last.items() if k.startswith(prefix)}

    def scalar(self, name: str) -> Tuple[List[int], List[float]]:
        """Iterations and values of a scalar in the metrics."""
        points = [(int(line["iteration"]), line[name]) for line in self.lines if name in line]
        return [i for i, _ in points], [value for _, value in points]

    @cached_property
    def losses(self) -> List[str]:
        """Names of the losses, the detector's own first, then those of the methods."""
        names = {name for line in self.lines for name in line if name.startswith("loss_")}
        return sorted(names, key=lambda name: (self.weight_of(name) is not None, name))

    def weight_of(self, loss: str) -> Optional[str]:
        """The scalar that holds the weight of a distillation loss; None of other losses."""
        name = f"distill/{loss[len('loss_') :]}/weight"
        return name if any(name in line for line in self.lines) else None

    def seconds(self) -> Dict[str, float]:
        """Median seconds of a step, "total" and by part; empty if it was not timed."""
        medians = {part: self._median(f"{part}_time") for part in TIMED_PARTS}
        total = self._median("time")
        return {"total": total, **split_time(total, medians)} if total else {}

    def memory(self) -> Optional[float]:
        """The most memory that it used, in MiB."""
        values = self.scalar("max_memory")[1]
        return max(values) if values else None

    def _median(self, name: str) -> float:
        values = self.scalar(name)[1]
        return float(np.median(values)) if values else 0.0

    @property
    def config_text(self) -> str:
        """Its exact config."""
        with open(self.run.config_file, encoding="utf-8") as f:
            return f.read()

    @property
    def starts(self) -> List[Dict[str, Any]]:
        """With which versions it was started and resumed."""
        return recorded_versions(self.run.folder)

    def first_checkpoint(self) -> str:
        """Path of the first checkpoint that was kept, "" if it is the one that is looked at."""
        names = checkpoint_names(self.run.folder)
        path = os.path.join(self.run.folder, names[0]) if names else ""
        return "" if path == self.run.weights else path

    def files(self) -> List[str]:
        """The checkpoints in its folder."""
        folder = self.run.folder
        others = [n for n in (BEST_WEIGHTS, EMA_WEIGHTS) if os.path.isfile(os.path.join(folder, n))]
        return [*checkpoint_names(folder), *others]


def facts_of(runs: Sequence[TrainedRun], baseline: Optional[TrainedRun]) -> List[RunFacts]:
    """The facts of runs, the baseline first. They are called after their folders, and where several
    checkpoints are of one folder, after these, too."""
    baselines = [baseline] if baseline else []
    everything = [*baselines, *(run for run in runs if run not in baselines)]
    folders = [run.folder for run in everything]
    names = _names(folders)

    def name_of(run: TrainedRun) -> str:
        file = f", {os.path.basename(run.weights)}" if folders.count(run.folder) > 1 else ""
        return names[run.folder] + file

    return [RunFacts(run, name_of(run), run in baselines) for run in everything]


def _names(folders: Sequence[str]) -> Mapping[str, str]:
    """The shortest endings of paths that tell them apart."""
    for length in range(1, 1 + max(folder.count(os.sep) for folder in folders)):
        names = {f: os.sep.join(f.split(os.sep)[-length:]) for f in folders}
        if len(set(names.values())) == len(set(folders)):
            return names
    return {folder: folder for folder in folders}

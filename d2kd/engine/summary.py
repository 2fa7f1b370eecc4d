"""What a run says of itself before its first step and after its last one."""

import os
import shlex

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from tabulate import tabulate

from d2kd.checkpoint import BEST_WEIGHTS, EMA_WEIGHTS, STUDENT_PROGRAM, STUDENT_YAML
from d2kd.checkpoint.student_config import modules_needed
from d2kd.command import typed_command
from d2kd.distillation import million_parameters
from d2kd.lazy import is_lazy
from d2kd.model_zoo import FINAL_WEIGHTS
from d2kd.views import any_family

from .averaging import EMA
from .metrics import METRICS_FILE, read_metrics
from .results import best_of, history_of
from .trainer import DistillTrainer
from .versions import VERSIONS

LOG = "log.txt"
# What is told of a run whose RUN.BEST_METRIC is empty
_METRIC = "bbox/AP"


def opening(trainer: DistillTrainer) -> str:
    """What is trained, on what, for how long, and where it goes: a few lines."""
    cfg = trainer.cfg
    rows = [
        ["student", _student(trainer)],
        ["learns from", _source(cfg)],
        [
            "trained on",
            f"{', '.join(cfg.DATASETS.TRAIN)}: {len(trainer.data_loader.dataset)} images",
        ],
        ["evaluated on", _evaluation(cfg)],
        ["length", _length(trainer)],
        ["folder", f"{cfg.OUTPUT_DIR} ({LOG} has all that is not shown here)"],
    ]
    return f"This run:\n{tabulate(rows, tablefmt='plain')}"


def _source(cfg: CfgNode) -> str:
    methods = ", ".join(cfg.DISTILL.METHODS)
    return f"{cfg.DISTILL.TEACHER.CONFIG}, by {methods}" if methods else "the ground truth alone"


def _student(trainer: DistillTrainer) -> str:
    name = any_family(trainer.student).name
    millions = million_parameters(trainer.student)
    start = trainer.cfg.MODEL.WEIGHTS or "random weights"
    if trainer.start_iter:
        start = trainer.checkpointer.get_checkpoint_file()
    place, processes = trainer.cfg.MODEL.DEVICE, comm.get_world_size()
    if processes > 1:
        place += f" in {processes} processes"
    return f"{name}, {millions:.2f} M parameters, on {place}, from {start}"


def _evaluation(cfg: CfgNode) -> str:
    sets = [f"{name}: {len(DatasetCatalog.get(name))} images" for name in cfg.DATASETS.TEST]
    period = cfg.TEST.EVAL_PERIOD
    when = f"every {period} iterations and at the end" if period else "at the end"
    return f"{', '.join(sets)}, {when}" if sets else "nothing, DATASETS.TEST is empty"


def _length(trainer: DistillTrainer) -> str:
    solver = trainer.cfg.SOLVER
    images = solver.IMS_PER_BATCH * solver.ACCUMULATION_STEPS
    epochs = trainer.max_iter * images / len(trainer.data_loader.dataset)
    first = f", from iteration {trainer.start_iter} on" if trainer.start_iter else ""
    return f"{trainer.max_iter} iterations of {images} images{first} ({epochs:.1f} epochs)"


def closing(cfg: CfgNode) -> str:
    """What a finished run has left, how good it is, and what to do with it."""
    folder = cfg.OUTPUT_DIR
    metric = cfg.RUN.BEST_METRIC or _METRIC
    lines = read_metrics(folder, cfg.DATASETS.TEST)
    history = history_of(metric, lines, cfg.SOLVER.MAX_ITER)
    best = best_of(history)
    own = STUDENT_PROGRAM if is_lazy(cfg) else STUDENT_YAML
    rows = [["the student", f"{os.path.join(folder, FINAL_WEIGHTS)}, its config {own}"]]
    if not is_lazy(cfg):
        modules = modules_needed(cfg)
        of_users = [f"the module {x}" for x in modules if x != "d2kd.modeling"]
        needs = f"needs {' and '.join(['two lines of d2kd', *of_users])}, see that file"
        needs = needs if modules else "needs no d2kd"
        rows.append(["", f"Detectron2 reads it, and {needs}"])
    if os.path.isfile(os.path.join(folder, BEST_WEIGHTS)):
        rows.append(["the best one", os.path.join(folder, BEST_WEIGHTS)])
    if os.path.isfile(os.path.join(folder, EMA_WEIGHTS)):
        rows.append(["its average", os.path.join(folder, EMA_WEIGHTS)])
        rows += [
            [f"{EMA}/{metric}", f"{value:.2f} at the end"]
            for _, value in history_of(f"{EMA}/{metric}", lines, cfg.SOLVER.MAX_ITER)[-1:]
        ]
    if best:
        last = f"{history[-1][1]:.2f} at the end, "
        rows.append([metric, f"{last}{best[1]:.2f} at best, after {best[0]} iterations"])
    files = f"{METRICS_FILE}, {LOG}, {VERSIONS}, and TensorBoard's events"
    rows.append(["the course of it", files])
    d2kd, word = shlex.join(typed_command()), shlex.quote(folder)
    rows += [
        ["next", f"{d2kd} report {word}"],
        ["", f"{d2kd} eval {word}"],
        ["", f"{d2kd} predict {word} IMAGE"],
        ["", f"{d2kd} export {word}"],
    ]
    return f"Done, in {folder}:\n{tabulate(rows, tablefmt='plain')}"

"""A teacher of other classes, trained on the student's data first: a run of its own."""

import os
import signal
import subprocess
import sys
from typing import Any, Dict, Sequence

from detectron2.config import CfgNode

from d2kd.checkpoint import newest_checkpoint
from d2kd.command import train_command
from d2kd.config import class_heads, read_config
from d2kd.data.described import num_classes_described
from d2kd.distillation import teacher_on_meta
from d2kd.errors import UserError
from d2kd.lazy import is_python
from d2kd.model_zoo import FINAL_WEIGHTS
from d2kd.one_line import exit_status, handled
from d2kd.schema import changed, plain_values
from d2kd.views import build_family

from .pair import Pair
from .recipe import described_datasets, merge, nested

# The teacher is trained as the student is, but on pixels in its own channel order
_AS_THE_STUDENT = ("SOLVER", "INPUT", "TEST", "DATALOADER", "SEED")


def teacher_recipe(pair: Pair, folder: str) -> Dict[str, Any]:
    """The content of the YAML that fine-tunes a teacher on the student's data, with the student's
    schedule.

    Args:
        pair: the two detectors.
        folder: of the teacher's run.
    """
    node = pair.cfg.DISTILL.TEACHER
    cfg = read_config(pair.teacher, node.OPTS)
    content: Dict[str, Any] = {"_BASE_": pair.teacher}
    merge(content, nested(node.OPTS))
    changes = plain_values(changed(pair.cfg, cfg))
    same = {name: changes[name] for name in _AS_THE_STUDENT if name in changes}
    same.get("INPUT", {}).pop("FORMAT", None)
    merge(content, same)
    merge(content, {"MODEL": {"WEIGHTS": pair.weights, "DEVICE": pair.cfg.MODEL.DEVICE}})
    if not num_classes_described(pair.cfg):  # else the number of classes follows from the data
        merge(content, {"MODEL": _heads(cfg, pair.student_classes.count)})
    content["DATASETS"] = described_datasets(pair.cfg)
    content["DISTILL"] = {"METHODS": []}
    content["OUTPUT_DIR"] = folder
    return content


def finetuned(pair: Pair) -> Pair:
    """The pair once the teacher has learned the student's classes. Its config and weights are still
    those that its own run starts from.

    Raises:
        UserError: if the teacher's config is Python, or nobody says how many classes to learn.
    """
    if is_python(pair.teacher):
        raise UserError(f"--finetune-teacher needs a teacher in YAML, and '{pair.teacher}' is not")
    count = pair.student_classes.count
    if count is None:
        raise UserError(
            f"--finetune-teacher needs the number of the student's classes, which neither the "
            f"data nor {type(pair.student_family).__name__}.num_classes says: give one of the two"
        )
    opts = [x for head in _heads(pair.cfg, count) for x in (f"MODEL.{head}.NUM_CLASSES", count)]
    return pair._replace(
        teacher_family=build_family(teacher_on_meta(pair.cfg, opts).detector),
        teacher_classes=pair.student_classes,
    )


def is_trained(folder: str) -> bool:
    """Whether the teacher's run has come to its end."""
    return os.path.isfile(os.path.join(folder, FINAL_WEIGHTS))


def train_teacher(recipe: str, options: Sequence[str]) -> None:
    """Trains a teacher in a process of its own; an interrupted run goes on. Ends this process if
    that one fails or is stopped.

    Args:
        recipe: the YAML.
        options: further words of ``d2kd train``.
    """
    resume = ["--resume"] if newest_checkpoint(os.path.dirname(recipe)) else []
    process = subprocess.Popen([*train_command(), "--config-file", recipe, *resume, *options])
    with handled(lambda number, frame: process.terminate(), [signal.SIGTERM]):
        try:
            status = process.wait()
        except KeyboardInterrupt:  # Ctrl-C is for the process, too: it saves what it has
            status = process.wait()
    if status:
        sys.exit(exit_status(-status) if status < 0 else status)


def _heads(cfg: CfgNode, count: int) -> Dict[str, Dict[str, int]]:
    """The number of classes in every head that a config describes."""
    return {head: {"NUM_CLASSES": count} for head in class_heads(cfg)}

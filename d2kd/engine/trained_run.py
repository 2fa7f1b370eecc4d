"""What training left: a folder that may have been moved to another place or machine."""

import os
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from torch import nn

from d2kd.checkpoint import (
    STUDENT_PROGRAM,
    STUDENT_YAML,
    checkpoint_names,
    class_names_in,
    load_trained_weights,
    pointed_checkpoint,
)
from d2kd.config import read_config
from d2kd.distillation import build_detector
from d2kd.errors import UserError
from d2kd.lazy import python_overrides

from .run_config import config_of_run, yaml_or_program


class TrainedRun(NamedTuple):
    """A run's folder and one of the checkpoints in it."""

    folder: str
    weights: str  # path of the checkpoint
    classes: Tuple[str, ...]  # names, in the order of the student's predictions; may be unknown

    def config(self, opts: Sequence = ()) -> CfgNode:
        """The run's config, with its teacher and methods, its folder being where it is now.

        Args:
            opts: changes to it, KEY VALUE ...; also of a run whose config is a Python program
        """
        return self._read(self.config_file, opts)

    def has_config(self) -> bool:
        """Whether :meth:`config` is there; a student that was copied elsewhere may come without."""
        return os.path.isfile(self.config_file)

    def student_config(self, opts: Sequence = ()) -> CfgNode:
        """The student's own config; ``MODEL.WEIGHTS`` is the checkpoint.

        Args:
            opts: changes to it, KEY VALUE ...; also of a run whose config is a Python program
        """
        return self._read(self.student_file, opts)

    @property
    def config_file(self) -> str:
        """Path of the run's config."""
        return config_of_run(self.folder)

    @property
    def student_file(self) -> str:
        """Path of the student's own config."""
        return _student_file(self.folder)

    def here(self) -> List[str]:
        """Changes to a config of the run that say where folder and checkpoint are now."""
        opts = ["MODEL.WEIGHTS", self.weights, "OUTPUT_DIR", self.folder]
        return python_overrides(self.student_file, opts)

    def _read(self, path: str, opts: Sequence) -> CfgNode:
        return read_config(path, [*self.here(), *python_overrides(path, opts)])

    def student(self, device: str = "") -> nn.Module:
        """The trained student in eval mode.

        Args:
            device: as in ``MODEL.DEVICE``; a GPU where there is one, unless given.

        Raises:
            UserError: if the checkpoint is not this student's.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        cfg = self.student_config(["MODEL.DEVICE", device])
        detector = build_detector(cfg, self.student_file)
        load_trained_weights(detector, self.weights, "the run's checkpoint", self.student_file)
        return detector.eval()


def open_run(path: str) -> TrainedRun:
    """
    Args:
        path: a run's folder, whose last checkpoint is taken, or one of its checkpoints.

    Raises:
        UserError: if there is no run, or nothing that it has saved.
    """
    folder, name = _folder_and_checkpoint(path)
    weights = os.path.join(folder, name) if name else ""
    if not os.path.isfile(_student_file(folder)) or not os.path.isfile(weights):
        what = "is no run" if os.path.exists(path) else "is not there"
        raise UserError(
            f"'{path}' {what}: give the folder with {STUDENT_YAML} (or {STUDENT_PROGRAM}) and "
            "the checkpoints that training wrote, or one of these checkpoints"
        )
    return TrainedRun(os.path.abspath(folder), os.path.abspath(weights), class_names_in(weights))


def detectron2_run(path: str) -> Optional[Tuple[str, str]]:
    """The config and a checkpoint of a run of Detectron2's own trainer.

    Args:
        path: its folder, whose last checkpoint is taken, or one of its checkpoints.

    Returns:
        paths of both; None if there is no such run.

    Raises:
        UserError: if it is the run of a LazyConfig, whose dump cannot be built from.
    """
    folder, name = _folder_and_checkpoint(path)
    config = config_of_run(folder)
    if os.path.isfile(_student_file(folder)) or not os.path.isfile(config) or not name:
        return None
    weights = os.path.join(folder, name)
    with open(config, errors="replace") as f:
        if "_target_:" in f.read():
            raise UserError(
                f"'{config}' is what a LazyConfig left, which is not read here: give the .py that "
                f"it was, with DISTILL.TEACHER.WEIGHTS {weights} at the end of the command"
            )
    return os.path.abspath(config), os.path.abspath(weights)


def _student_file(folder: str) -> str:
    return yaml_or_program(folder, STUDENT_YAML, STUDENT_PROGRAM)


def _folder_and_checkpoint(path: str) -> Tuple[str, Optional[str]]:
    """A run's folder, and the name of its checkpoint that a path means, the last one if it is the
    folder's; None if there is none."""
    folder, name = (path, None) if os.path.isdir(path) else os.path.split(path)
    return folder, name or _last(folder)


def _last(folder: str) -> Optional[str]:
    """As resuming does: a run that was made longer and interrupted has a newer one than the final
    one."""
    names = checkpoint_names(folder)
    pointed = pointed_checkpoint(folder)
    return pointed if pointed in names else next(reversed(names), None)

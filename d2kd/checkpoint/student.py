"""What a run saves: the student as a plain Detectron2 file, and beside it what resuming needs."""

import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from d2kd.errors import UserError
from d2kd.lazy import lazy_config, to_program
from d2kd.model_zoo import FINAL_WEIGHTS
from d2kd.writing import AtomicPathManager, atomic_write

from .files import Unreadable, read_file
from .finite import first_not_finite
from .formats import CLASSES
from .resuming import (
    BEST_WEIGHTS,
    EMA_WEIGHTS,
    SavedRun,
    newest_checkpoint,
    outdated_checkpoints,
)
from .student_config import modules_needed, student_config
from .weights import SafeCheckpointer

STUDENT_YAML = "student.yaml"
STUDENT_PROGRAM = "student.py"  # of a run whose config is a Python program


# In the file of the best student: what it was chosen by
_BEST = "best"
# What only resuming needs, which the file of the best student is not for
_OF_THE_RUN = ("trainer", "run_state")


class Best(NamedTuple):
    """The best value of a metric in a run so far."""

    metric: str  # such as bbox/AP
    value: float
    iteration: int  # of the steps, counted from 0, after which it was measured
    test_sets: List[str] = []  # on which; unknown of files of versions until 0.3.0


class StudentCheckpointer(SafeCheckpointer):
    """Saves and loads the bare student under ``model``. Stock Detectron2 reads that file and
    ignores the other keys: ``classes`` (names), ``distillers`` (adapters), ``trainer``,
    ``run_state``.

    A checkpoint is on the disk whole or not at all, and carries a checksum of each of its records.
    """

    _newest: Optional[SavedRun] = None
    _last_saved = ""

    def __init__(self, *args, class_names: Sequence[str] = (), keep: int = 0, **kwargs):
        """
        Args:
            class_names: of the data, in order, if known; saved under ``classes``.
            keep: how many of the numbered checkpoints stay, the newest ones; 0 for all.
        """
        super().__init__(*args, **kwargs)
        self._class_names = list(class_names)
        self._keep = keep
        self.path_manager = AtomicPathManager()

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """As in fvcore, but a checkpoint that cannot be read gives way to the one before it."""
        self._newest = newest_checkpoint(self.save_dir) if resume else None
        self.weights_key = "the checkpoint to resume" if self._newest else "MODEL.WEIGHTS"
        return super().resume_or_load(path, resume=resume)

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Raises:
            UserError: if the student is not finite, so that what was saved before stays the newest,
                or if the disk takes no more.
        """
        self._refuse_not_finite(name)
        super().save(name, **self._classes, **kwargs)
        self._last_saved = os.path.join(self.save_dir, f"{name}.pth")
        if self._keep and self.save_to_disk:  # the new one is whole, and the pointer names it
            for outdated in outdated_checkpoints(self.save_dir, f"{name}.pth", self._keep):
                self.path_manager.rm(os.path.join(self.save_dir, outdated))

    def save_best(self, best: Best) -> None:
        """Writes the student, with its adapters, as the best one so far. A run does not go on from
        this file.

        Raises:
            UserError: as :meth:`save`.
        """
        self._refuse_not_finite(BEST_WEIGHTS)
        adapters = {
            key: part.state_dict()
            for key, part in self.checkpointables.items()
            if key not in _OF_THE_RUN
        }
        content = {"model": self.model.state_dict(), **adapters, **self._classes}
        with self.path_manager.open(os.path.join(self.save_dir, BEST_WEIGHTS), "wb") as f:
            torch.save({**content, _BEST: best._asdict()}, f)

    def save_ema(self, average: nn.Module, iteration: int) -> None:
        """Writes the moving average of the student, as a student.

        Args:
            average: a detector like the student.
            iteration: the last one, counted from 0.

        Raises:
            UserError: as :meth:`save`.
        """
        if not self.save_to_disk:
            return
        content = {"model": average.state_dict(), **self._classes, "iteration": iteration}
        with self.path_manager.open(os.path.join(self.save_dir, EMA_WEIGHTS), "wb") as f:
            torch.save(content, f)

    @property
    def _classes(self) -> Dict[str, Any]:
        return {CLASSES: self._class_names} if self._class_names else {}

    def _refuse_not_finite(self, name: str) -> None:
        tensor = first_not_finite(self.model.state_dict())
        if tensor:
            raise UserError(
                f"{name} is not saved: the student's {tensor} is not finite since this step, whose "
                "gradient was not; lower SOLVER.BASE_LR, or add SOLVER.CLIP_GRADIENTS.ENABLED "
                "True, and go on from the checkpoint before with --force-resume"
            )

    def has_checkpoint(self) -> bool:
        return self._newest is not None

    def get_checkpoint_file(self) -> str:
        return self._last_saved or (self._newest.path if self._newest else "")

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        unfilled = {*incompatible.missing_keys, *(n for n, *_ in incompatible.incorrect_shapes)}
        if self._newest and unfilled:
            raise UserError(
                f"the checkpoint to resume is '{self._newest.path}': it does not fill "
                f"{len(unfilled)} tensors of the student, such as {min(unfilled)}; give the config "
                "of its run, or another OUTPUT_DIR"
            )
        if unfilled.issuperset(self.model.state_dict()):
            raise UserError(
                "MODEL.WEIGHTS fills nothing of the student: give a file of the same architecture "
                "or backbone, or '' to train from scratch"
            )
        return incompatible


def read_best(folder: str) -> Optional[Best]:
    """What the best student in a run's folder was chosen by; None if there is none, or its file
    cannot be read."""
    try:
        data, _ = read_file(os.path.join(folder, BEST_WEIGHTS))
        return Best(**data[_BEST])
    except (OSError, Unreadable, KeyError, TypeError):
        return None


def write_student_yaml(cfg: CfgNode) -> None:
    """Writes the student's own config beside its weights, on the main process."""
    if not comm.is_main_process():
        return
    header = (
        f"# The student of this run as a plain detector; its weights are {FINAL_WEIGHTS}, beside\n"
        "# this file. Detectron2 looks for them where MODEL.WEIGHTS says, which is where the run\n"
        f"# wrote them: once the folder has moved, give MODEL.WEIGHTS <folder>/{FINAL_WEIGHTS}\n"
    )
    modules = modules_needed(cfg)
    if modules:
        header += (
            "# Detectron2 has no such architecture or backbone in YAML: import "
            f"{' and '.join(modules)},\n"
            "# and call d2kd.config.add_distill_config(cfg) before this file is read\n"
        )
    with atomic_write(os.path.join(cfg.OUTPUT_DIR, STUDENT_YAML)) as f:
        f.write(header + student_config(cfg).dump())


def write_student_program(cfg: CfgNode) -> None:
    """Writes the student's own Python config beside its weights, on the main process."""
    if not comm.is_main_process():
        return
    config = lazy_config(cfg)
    for node in ("distill", "run"):
        del config[node]
    header = (
        f"# The student of this run as a plain detector; its weights are {FINAL_WEIGHTS}, beside\n"
        "# this file:\n"
        f'#   config = LazyConfig.load("{STUDENT_PROGRAM}")\n'
        "#   model = instantiate(config.model)\n"
        "#   DetectionCheckpointer(model).load(config.train.init_checkpoint)"
    )
    here = f'os.path.join(os.path.dirname(os.path.abspath(__file__)), "{FINAL_WEIGHTS}")'
    end = f'train["init_checkpoint"] = {here}\n'
    with atomic_write(os.path.join(cfg.OUTPUT_DIR, STUDENT_PROGRAM)) as f:
        f.write(to_program(config, header, end))

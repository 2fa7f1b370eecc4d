"""Finding the checkpoint from which a run goes on."""

import logging
import os
import re
from typing import Any, Dict, List, NamedTuple, Optional

from detectron2.utils.file_io import PathManager

from d2kd.errors import UserError
from d2kd.model_zoo import FINAL_WEIGHTS

from .files import Unreadable, read_file

logger = logging.getLogger(__name__)

POINTER = "last_checkpoint"
BEST_WEIGHTS = "model_best.pth"
EMA_WEIGHTS = "model_ema.pth"
# Of the trainer's state: the names of trained parameters in the order of the optimizer
PARAMETER_NAMES = "parameter_names"
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")


class SavedRun(NamedTuple):
    """A checkpoint that a run can go on from."""

    path: str
    steps: int  # that the run had done
    processes: int  # that it had


def checkpoint_names(folder: str) -> List[str]:
    """The checkpoints of a run in its folder, oldest first; the final one comes last."""
    if not PathManager.isdir(folder):
        return []
    names = [n for n in PathManager.ls(folder) if _NUMBERED.fullmatch(n) or n == FINAL_WEIGHTS]
    return sorted(names, key=lambda name: (name == FINAL_WEIGHTS, name))


def outdated_checkpoints(folder: str, newest: str, keep: int) -> List[str]:
    """The numbered checkpoints that are no more needed, by name.

    Args:
        folder: of the run.
        newest: name of the one that was written last. Those with higher numbers, of a run that went
            on from an earlier one, are left alone: it will write them again.
        keep: how many of the numbered ones stay, at least 1.
    """
    names = checkpoint_names(folder)
    so_far = names[: names.index(newest) + 1] if newest in names else []
    return [name for name in so_far if name != FINAL_WEIGHTS][:-keep]


def refuse_occupied(output_dir: str) -> None:
    """
    Raises:
        UserError: if the folder holds a run, finished or not, that a new one would overwrite.
    """
    names = checkpoint_names(output_dir)
    for name in (EMA_WEIGHTS, BEST_WEIGHTS, POINTER):
        if PathManager.exists(os.path.join(output_dir, name)):
            names.insert(0, name)
    if names:
        state = "a finished run" if names[-1] == FINAL_WEIGHTS else "an unfinished run"
        raise UserError(
            f"OUTPUT_DIR '{output_dir}' holds {state} ({names[-1]}): add --resume to continue it, "
            "or give another OUTPUT_DIR"
        )


def newest_checkpoint(output_dir: str) -> Optional[SavedRun]:
    """The checkpoint that a folder's pointer names, or, if that cannot be read, the newest before
    it that can. Every byte of it has been checked. What is left out is logged.

    Returns:
        None if the folder holds no checkpoint.

    Raises:
        UserError: if none of its checkpoints can be read, or the one to use is of 0.1.0, whose keys
            had other names, and whose state of the optimizer cannot be matched with parameters.
    """
    names, reasons = _candidates(output_dir), []
    for name in reversed(names):
        path = os.path.join(output_dir, name)
        try:
            saved = _saved_run(path)
        except (Unreadable, OSError) as e:
            reasons.append(f"{name}: {e}")
            logger.warning(f"{path} cannot be used to resume ({e}); looking for the one before it")
            continue
        if reasons:
            logger.warning(f"Resuming from {path}, after {saved.steps} steps, instead")
        return saved
    if reasons:
        raise UserError(
            f"OUTPUT_DIR '{output_dir}': none of its {len(reasons)} checkpoints can be read "
            f"({reasons[0]}): train anew in another OUTPUT_DIR"
        )
    return None


def _candidates(folder: str) -> List[str]:
    """From the oldest to the one that the pointer names; all if it names none."""
    names = checkpoint_names(folder)
    pointed = pointed_checkpoint(folder)
    if pointed in names:
        if pointed == FINAL_WEIGHTS:
            return names
        return names[: names.index(pointed) + 1]
    if names:
        logger.warning(
            f"{os.path.join(folder, POINTER)} does not name a checkpoint of this folder: looking "
            f"for the newest of {len(names)}"
        )
    return _by_steps(folder, names)


def _by_steps(folder: str, names: List[str]) -> List[str]:
    """A final checkpoint may be older than others, where a run was made longer."""
    if FINAL_WEIGHTS not in names:
        return names
    try:
        steps = _saved_run(os.path.join(folder, FINAL_WEIGHTS)).steps
    except (Unreadable, OSError, UserError):
        return names
    numbered = [n for n in names if n != FINAL_WEIGHTS]
    later = [n for n in numbered if int(_NUMBERED.fullmatch(n)[1]) >= steps]
    return [*(n for n in numbered if n not in later), FINAL_WEIGHTS, *later]


def pointed_checkpoint(folder: str) -> str:
    """The name in a run's ``last_checkpoint``, the file that was written last; "" without one."""
    try:
        with PathManager.open(os.path.join(folder, POINTER), "rb") as f:
            return f.read(256).decode(errors="replace").strip()
    except OSError:
        return ""


def _saved_run(path: str) -> SavedRun:
    data, _ = read_file(path)
    trainer: Dict[str, Any] = data.get("trainer", {}) if isinstance(data, dict) else {}
    if not isinstance(trainer, dict) or "iteration" not in trainer:
        raise Unreadable("holds weights alone, nothing to resume from")
    if PARAMETER_NAMES not in trainer:
        raise UserError(
            f"OUTPUT_DIR '{os.path.dirname(path)}' holds a run of an older d2kd, which this "
            "version cannot continue: train it anew in another OUTPUT_DIR, from its weights with "
            "MODEL.WEIGHTS"
        )
    iteration, state = trainer["iteration"], data.get("run_state", {})
    if type(iteration) is not int or iteration < 0 or not isinstance(state, dict):
        raise Unreadable("its iteration or the state of its run is not what d2kd writes")
    ranks, scalars = state.get("ranks", []), state.get("scalars", {})
    if not isinstance(ranks, list) or not isinstance(scalars, dict):
        raise Unreadable("the state of its run is not what d2kd writes")
    return SavedRun(path, iteration + 1, len(ranks))

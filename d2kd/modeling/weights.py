"""Reading the weights of teachers and students, with proof that they arrived."""

import contextlib
import logging
import zlib
from typing import Iterator, List

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from d2kd.errors import UserError

logger = logging.getLogger(__name__)

# Counts steps of a BatchNorm in training; has no effect on a frozen model
_NOT_WEIGHTS = ("num_batches_tracked",)


class _CompleteCheckpointer(DetectionCheckpointer):
    """Reads model weights and keeps the names of those that the file did not fill."""

    unfilled: List[str] = []

    def _log_incompatible_keys(self, incompatible) -> None:
        wrong_shape = [name for name, *_ in incompatible.incorrect_shapes]
        missing = [*incompatible.missing_keys, *wrong_shape]
        self.unfilled = [name for name in missing if not name.endswith(_NOT_WEIGHTS)]
        super()._log_incompatible_keys(incompatible)


def read_weights(model: nn.Module, path: str, key: str) -> List[str]:
    """Fills a model from a file.

    Args:
        model: changed in place.
        path: a file, a URL or a ``detectron2://`` name.
        key: the config key that gave the path, for messages.

    Returns:
        names of parameters and buffers that the file did not fill.

    Raises:
        UserError: if the file cannot be had or read.
    """
    checkpointer = _CompleteCheckpointer(model)
    with reading(path, key):
        checkpointer.load(path, checkpointables=[])
    return checkpointer.unfilled


@contextlib.contextmanager
def reading(path: str, key: str) -> Iterator[None]:
    """Turns what goes wrong when a checkpoint is read into a :class:`UserError`.

    Args:
        path: the file, URL or ``detectron2://`` name.
        key: the config key that gave it.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, AssertionError) as e:  # missing, unreachable
        raise UserError(f"{key} is '{path}': {_first_line(e) or 'cannot be read'}") from e
    except Exception as e:  # whatever a damaged file makes the unpickler raise
        raise UserError(
            f"{key} is '{path}': not a checkpoint that Detectron2 can read ({_first_line(e)})"
        ) from e


def load_teacher_weights(teacher: nn.Module, path: str) -> None:
    """Fills the teacher, and says what it was filled with.

    Args:
        teacher: changed in place.
        path: a file, a URL or a ``detectron2://`` name.

    Raises:
        UserError: if there is no path, the file cannot be read, or it leaves any parameter or
            buffer as it was initialised.
    """
    key = "DISTILL.TEACHER.WEIGHTS"
    if not path:
        raise UserError(
            f"{key} is empty and DISTILL.TEACHER.CONFIG names none: give the teacher's checkpoint"
        )
    unfilled = read_weights(teacher, path, key)
    if unfilled:
        shown = ", ".join(unfilled[:3]) + (", ..." if len(unfilled) > 3 else "")
        raise UserError(
            f"{key} is '{path}': it does not fill {len(unfilled)} of the teacher's "
            f"{len(teacher.state_dict())} tensors ({shown}); give the checkpoint of the detector "
            "that DISTILL.TEACHER.CONFIG describes, or correct DISTILL.TEACHER.OPTS"
        )
    count = sum(p.numel() for p in teacher.parameters())
    logger.info(f"Teacher: all {count:,} parameters from {path} (checksum {checksum(teacher)})")


def checksum(model: nn.Module) -> str:
    """Eight hex digits that change when any parameter or buffer does. For models on the CPU."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].strip().rstrip(".")

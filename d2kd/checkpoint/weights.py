"""Reading the weights of teachers and students, with proof that they arrived."""

import contextlib
import datetime
import logging
import os
import pickle
import zlib
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple
from urllib.parse import parse_qs

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from d2kd.errors import UserError, first_of
from d2kd.model_zoo import FINAL_WEIGHTS

from .downloads import check_hash, is_address, offline_advice
from .files import Unreadable
from .finite import refuse_not_finite
from .formats import CLASSES, classes_in, read_checkpoint
from .verify import other_settings, verify

logger = logging.getLogger(__name__)

# Counts steps of a BatchNorm in training; has no effect on a frozen model
_NOT_WEIGHTS = ("num_batches_tracked",)
_STATISTICS = (".running_mean", ".running_var")


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but reading never runs what a file holds, and files of MMDetection
    and torchvision are read as well.

    Attributes:
        weights_key: the config key that gives the path, for messages.
        unfilled: after loading, the names of parameters and buffers that the file did not fill.
        other_shapes: of these, name -> shape in the file and in the model, where they differ.
        left_over: names in a file of MMDetection that the model has no place for.
        meta: what a file of MMDetection says of itself.
        classes: the names of its classes, of a file of d2kd.
        iteration: after how many steps the file was written, if it says so.
    """

    weights_key = "MODEL.WEIGHTS"
    unfilled: Sequence[str] = ()
    other_shapes: Mapping[str, Tuple[Sequence[int], Sequence[int]]] = {}
    left_over: Sequence[str] = ()
    meta: Optional[Mapping] = None
    classes: Sequence[str] = ()
    iteration: Optional[int] = None

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        self._downloaded = is_address(path or "")
        with reading(path, self.weights_key):
            return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        check_hash(filename, self._downloaded)
        checkpoint = read_checkpoint(filename, self.model.state_dict())
        # Of an address like "...pth?matching_heuristics=True", in Detectron2 after 0.6
        address = getattr(self, "_parsed_url_during_load", None)
        if address and parse_qs(address.query).get("matching_heuristics") == ["True"]:
            checkpoint["matching_heuristics"] = True
        return checkpoint

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        state = checkpoint["model"]
        by_name = not ("__author__" in checkpoint or checkpoint.get("matching_heuristics"))
        sources, self.meta = checkpoint.pop("sources", {}), checkpoint.pop("meta", None)
        self.classes = classes_in(checkpoint)
        checkpoint.pop(CLASSES, None)
        if isinstance(checkpoint.get("iteration"), int):  # Detectron2 counts from 0
            self.iteration = checkpoint["iteration"] + 1
        incompatible = super()._load_model(checkpoint)
        self.other_shapes = {name: shapes for name, *shapes in incompatible.incorrect_shapes}
        if by_name:
            # FrozenBatchNorm2d fills statistics that are absent, and does not tell. That is right
            # for networks in which they are part of the weights, as in Detectron's.
            known = {*state, *self.other_shapes, *incompatible.missing_keys}
            statistics = (n for n in self.model.state_dict() if n.endswith(_STATISTICS))
            incompatible.missing_keys.extend(n for n in statistics if n not in known)
        missing = dict.fromkeys([*incompatible.missing_keys, *self.other_shapes])
        self.unfilled = [name for name in missing if not name.endswith(_NOT_WEIGHTS)]
        self.left_over = [sources[n] for n in incompatible.unexpected_keys if sources.get(n)]
        return incompatible


def read_weights(model: nn.Module, path: str, key: str) -> List[str]:
    """Fills a model from a file: one of Detectron2 or its model zoo, of MMDetection or torchvision.

    Args:
        model: changed in place.
        path: a file, a URL or a ``detectron2://`` name.
        key: the config key that gave the path, for messages.

    Returns:
        names of parameters and buffers that the file did not fill.

    Raises:
        UserError: if the file cannot be had or read, or is MMDetection's and holds parameters that
            the model has no place for.
    """
    return list(_load(model, path, key).unfilled)


def _load(model: nn.Module, path: str, key: str) -> SafeCheckpointer:
    checkpointer = SafeCheckpointer(model)
    checkpointer.weights_key = key
    checkpointer.load(path, checkpointables=[])
    if checkpointer.left_over:
        raise UserError(
            f"{key} is '{path}': the detector has no place for {len(checkpointer.left_over)} of "
            f"MMDetection's parameters ({first_of(checkpointer.left_over, 3)}); give the "
            "checkpoint of the detector that the config describes"
        )
    return checkpointer


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
    except Unreadable as e:
        raise UserError(f"{key} is '{path}': {e}") from e
    except (OSError, AssertionError) as e:  # missing, unreachable
        reason = _first_line(e).rstrip("!") or "cannot be read"
        if is_address(path):
            raise UserError(f"{key} is '{path}': {reason}; {offline_advice(path, key)}") from e
        if os.path.isdir(path):
            reason = f"is a folder: give a file in it, such as {os.path.join(path, FINAL_WEIGHTS)}"
        elif not os.path.exists(path):
            here = "" if os.path.isabs(path) else f" in {os.getcwd()}"
            reason = f"no such file{here}: correct the path, or make the file first"
        raise UserError(f"{key} is '{path}': {reason}") from e
    except Exception as e:  # what Detectron2 cannot use
        # Of torch's own error, the text advises to switch its safe reading off.
        advice = isinstance(e, pickle.UnpicklingError)
        reason = type(e).__name__ if advice else _first_line(e)
        raise UserError(
            f"{key} is '{path}': not a checkpoint that Detectron2 can read ({reason})"
        ) from e


def refuse_missing(path: str, key: str) -> None:
    """
    Args:
        path: a file, if any; what a URL or a ``detectron2://`` name leads to is not looked for.
        key: the config key that gave the path, for messages.

    Raises:
        UserError: if the file is missing or cannot be opened.
    """
    if path and not is_address(path):
        # Detectron2 takes options behind a file's name
        file = path if os.path.exists(path) else path.partition("?")[0]
        with reading(path, key), open(file, "rb"):
            pass


def load_trained_weights(
    detector: nn.Module,
    path: str,
    key: str,
    config: str,
    input_format: Optional[str] = None,
    class_names: Sequence[str] = (),
    compared_by: Optional[Sequence[str]] = None,
) -> str:
    """Fills a detector that is not to be trained further, and says what it was filled with.

    Args:
        detector: changed in place.
        path: a file, a URL or a ``detectron2://`` name.
        key: the config key that gave the path, for messages.
        config: what describes the detector, for messages.
        input_format: ``INPUT.FORMAT`` of the detector's config.
        class_names, compared_by: see :func:`~d2kd.checkpoint.verify.verify`.

    Returns:
        for the pair report: after how many steps and when a file of this machine was written, and
        "verified ..." or "unverified ...", see :func:`~d2kd.checkpoint.verify.verify`.

    Raises:
        UserError: if there is no path, the file cannot be read, leaves any parameter or buffer as
            it was initialised, holds NaN or infinite values, or was trained with other pixels,
            strides or classes.
    """
    if not path:
        raise UserError(f"{key} is empty and {config} names none: give the detector's checkpoint")
    checkpointer = _load(detector, path, key)
    if checkpointer.unfilled:
        causes = [*_shapes(checkpointer), other_settings(checkpointer.meta, detector, input_format)]
        raise UserError(
            f"{key} is '{path}': it does not fill {len(checkpointer.unfilled)} of the detector's "
            f"{len(detector.state_dict())} tensors ({first_of(checkpointer.unfilled, 3)}); "
            f"{''.join(f'{cause}; ' for cause in causes if cause)}give the checkpoint of the "
            f"detector that {config} describes, or correct {config}"
        )
    refuse_not_finite(detector, key, path)
    source = f"{key} is '{path}', read into the detector of {config}"
    meta = checkpointer.meta or {"CLASSES": checkpointer.classes or None}
    verdict = verify(meta, detector, source, input_format, class_names, compared_by)
    return ", ".join([*_origin(path, checkpointer.iteration), verdict])


def _shapes(checkpointer: SafeCheckpointer) -> Iterator[str]:
    """Of the first tensor whose shape differs."""
    for name, (in_file, expected) in list(checkpointer.other_shapes.items())[:1]:
        yield f"{name} is {tuple(in_file)} in the file, {tuple(expected)} in the detector"


def _origin(path: str, iteration: Optional[int]) -> Iterator[str]:
    if iteration is not None:
        yield f"after {iteration} steps"
    if os.path.isfile(path):
        yield f"written {datetime.date.fromtimestamp(os.path.getmtime(path))}"


def load_teacher_weights(
    teacher: nn.Module,
    path: str,
    input_format: Optional[str] = None,
    class_names: Sequence[str] = (),
    compared_by: Optional[Sequence[str]] = None,
) -> str:
    """:func:`load_trained_weights` of ``DISTILL.TEACHER``."""
    config = "DISTILL.TEACHER.CONFIG with DISTILL.TEACHER.OPTS"
    key = "DISTILL.TEACHER.WEIGHTS"
    text = load_trained_weights(teacher, path, key, config, input_format, class_names, compared_by)
    count = sum(p.numel() for p in teacher.parameters())
    logger.info(f"Teacher: all {count:,} parameters from {path}")
    return text


def checksum(model: nn.Module) -> str:
    """Eight hex digits that change when any parameter or buffer does. Every tensor is copied to the
    CPU."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].strip().rstrip(".")

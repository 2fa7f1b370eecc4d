"""Checks of a registered data set: of the file of its annotations, of its dicts, of its images."""

import contextlib
import json
import logging
import os
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from d2kd.errors import UserError

from .annotations import check_annotations
from .classes import class_names_of
from .dicts import findings_in_dicts
from .findings import ERROR, Finding, by_kind, count
from .images import check_image

logger = logging.getLogger(__name__)

# What reading a data set ends in if its files are not as they should be
_LOADING_ERRORS = (
    OSError,
    AssertionError,
    AttributeError,
    ImportError,  # of a format's own library
    LookupError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)
MAX_ERROR_LENGTH = 200  # characters of somebody else's message that are passed on
# Images that are opened before a run starts: enough to notice what all of them have
_SAMPLE = 8
_NOT_IN_FOLDER = (
    "does not exist: is its 'file_name' relative to the folder of the images? (In VOC's layout the "
    "split names images, without their ending)"
)


def _not_there() -> str:
    """What to say of a file of a data set, with the folder of all data sets."""
    root = os.getenv("DETECTRON2_DATASETS")
    where = f"is {root}" if root else "is unset: ./datasets"
    return f"does not exist (DETECTRON2_DATASETS {where}); see datasets/README.md"


@contextlib.contextmanager
def load_errors_explained(names: Sequence[str]) -> Iterator[None]:
    """Inside of it, data sets are read.

    Args:
        names: of the sets.

    Raises:
        UserError: instead of whatever reading ends in if their files are not as they should be.
    """
    try:
        yield
    except UserError:
        raise
    except _LOADING_ERRORS as error:
        raise UserError(_why_not_loaded(error, names)) from error


def _why_not_loaded(error: Exception, names: Sequence[str]) -> str:
    """One line on why the data sets could not be loaded: what, in which file, what to do."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename} {_not_there()}"
    files = [MetadataCatalog.get(name).get("json_file") for name in names]
    where = ", ".join(file for file in files if file) or ", ".join(names)
    if isinstance(error, json.JSONDecodeError):
        return f"{where} {no_json(error)}"
    if str(error).startswith("No valid data found"):
        return f"{where} holds no image with an annotation that is not a crowd"
    if isinstance(error, KeyError) and "category_id" not in str(error):
        return f"{where} lacks the key {error}: is it in COCO's instances format?"
    said = " ".join(str(error.args[0] if error.args else error).split())[:MAX_ERROR_LENGTH]
    return f"{where} cannot be used: {said or type(error).__name__}"


def has_annotation_file(name: str) -> bool:
    """Whether a registered set comes from a file in COCO's instances format that is there."""
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file")
    return metadata.get("evaluator_type") == "coco" and bool(path) and PathManager.isfile(path)


def read_annotations(path: str) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError, RecursionError: if it is none.
    """
    with PathManager.open(path, "r") as f:
        return json.load(f)


def no_json(error: Exception) -> str:
    """What to say of a file that a JSON parser refused."""
    if "BOM" in str(error):
        return "begins with a byte-order mark: save it as UTF-8 without one"
    return f"is not valid JSON ({error}): was it copied completely?"


def findings_in_file(name: str, evaluated: bool, masks: str) -> List[Finding]:
    """
    Args:
        name: of a set with an annotation file.
        evaluated: it is evaluated with.
        masks: what :func:`~d2kd.data.annotations.check_annotations` takes.
    """
    path = MetadataCatalog.get(name).json_file
    try:
        data = read_annotations(path)
    except (ValueError, RecursionError) as error:
        return [Finding("file that is no JSON", ERROR, path, no_json(error))]
    return check_annotations(data, path, evaluated, masks)


class DatasetContent(NamedTuple):
    """What there is in a data set."""

    images: List[Dict[str, Any]]  # of each, in Detectron2's format, its file, size and id
    boxes: Optional[int]  # None if they cannot be loaded
    classes: int
    findings: List[Finding]  # on its annotations

    def __str__(self) -> str:
        boxes = "boxes that cannot be loaded" if self.boxes is None else f"{self.boxes} boxes"
        return f"{len(self.images)} images, {boxes}, {self.classes} classes"


def inspect_dataset(name: str, evaluated: bool, masks: str) -> DatasetContent:
    """
    Args:
        name: of a registered data set.
        evaluated: it is evaluated with.
        masks: what :func:`~d2kd.data.annotations.check_annotations` takes.
    """
    dicts, findings = [], []
    try:
        with load_errors_explained([name]):
            dicts = DatasetCatalog.get(name)
    except UserError as error:
        findings = [Finding("data set that cannot be loaded", ERROR, "", str(error))]
    if has_annotation_file(name):
        in_file = findings_in_file(name, evaluated, masks)
        # Why it cannot be loaded is said there with more detail.
        findings = in_file if count(in_file, ERROR) else [*findings, *in_file]
    else:
        findings += findings_in_dicts(dicts, name, evaluated, masks) if dicts else []
    boxes = sum(len(d.get("annotations", ())) for d in dicts) if dicts else None
    images = dicts or _images_of_file(name)
    return DatasetContent(images, boxes, len(class_names_of([name])), findings)


def _images_of_file(name: str) -> List[Dict[str, Any]]:
    """What a file with faults says of images, as far as they can be found."""
    metadata = MetadataCatalog.get(name)
    try:
        entries = (
            read_annotations(metadata.json_file)["images"] if has_annotation_file(name) else []
        )
        entries = [e for e in entries if isinstance(e.get("file_name"), str)]
    except _LOADING_ERRORS:
        return []
    root = metadata.get("image_root", "")
    return [
        {
            **{side: e[side] for side in ("width", "height") if side in e},
            "file_name": os.path.join(root, e["file_name"]),
            "image_id": e.get("id"),
        }
        for e in entries
    ]


def check_image_sample(dicts: Sequence[Mapping[str, Any]]) -> List[Finding]:
    """Images that are not there, and what is wrong with some of those that are.

    Args:
        dicts: in Detectron2's format.
    """
    missing = _missing(dicts)
    lost = {finding.file for finding in missing}
    there = [d for d in dicts if d.get("file_name") not in lost]
    sample = there[:: max(len(there) // _SAMPLE, 1)][:_SAMPLE]
    found = filter(None, map(check_image, sample))
    return missing + [finding for finding in found if finding.severity == ERROR]


def _missing(dicts: Sequence[Mapping[str, Any]]) -> List[Finding]:
    """By one listing per folder, which is quick where asking for each file is not."""
    listed: Dict[str, Optional[Set[str]]] = {}  # None: there is no such folder
    findings = []
    for d in dicts:
        path = d.get("file_name")
        if path is None or "://" in os.fspath(path):
            continue
        folder, name = os.path.split(os.path.abspath(path))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else None
        there = listed[folder]
        if there is None or name not in there:
            text = _not_there() if there is None else _NOT_IN_FOLDER
            findings.append(Finding("image missing", ERROR, path, text, d.get("image_id")))
    return findings


def refuse_errors(findings: Sequence[Finding], key: str) -> None:
    """Logs warnings, one line per kind.

    Args:
        findings: of a data set.
        key: that names the set.

    Raises:
        UserError: for the first error, with how many more there are.
    """
    groups = by_kind(findings)
    errors = [group for group in groups if group[0].severity == ERROR]
    if errors:
        number = sum(map(len, errors)) - 1
        more = f"; {number} more errors, which 'd2kd check' shows" if number else ""
        raise UserError(f"{key}: {errors[0][0]}{more}")
    for group in groups:
        logger.warning(f"{key}: {group[0].kind} ({len(group)}), for instance {group[0]}")

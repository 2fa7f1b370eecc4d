"""Load the training set once, and turn the usual troubles with data into one-line errors."""

import json
import logging
import os
from typing import Iterable, List, Optional

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from d2kd.errors import UserError, nearest

logger = logging.getLogger(__name__)

EMPTY_SIDE = 1e-5  # pixels; Detectron2 drops boxes whose width or height is not above it
MAX_ERROR_LENGTH = 200  # characters of somebody else's message that are passed on


def check_dataset_names(cfg) -> None:
    """Check that DATASETS.TRAIN names something and that all data sets of the config are known.

    Raises:
        UserError: naming the key, the name and the nearest known one.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set, e.g. ('coco_2017_train',)")
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                known = nearest(name, DatasetCatalog.list())
                raise UserError(f"DATASETS.{key}: there is no data set '{name}'; {known}")


def load_training_dicts(cfg) -> List[dict]:
    """Load the sets of DATASETS.TRAIN as Detectron2's training loader does, and check them.

    Returns:
        dicts in Detectron2's format, filtered as the config says.

    Raises:
        UserError: unknown names, missing or corrupt files, no annotations, unknown categories.
    """
    check_dataset_names(cfg)
    names = cfg.DATASETS.TRAIN
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    try:
        dicts = get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except UserError:
        raise
    except (OSError, AssertionError, KeyError, ValueError) as error:
        raise UserError(f"DATASETS.TRAIN: {_explain(error, names)}") from error
    if not isinstance(dicts, list):
        raise UserError(
            f"DATASETS.TRAIN: {', '.join(names)} gives a {type(dicts).__name__}, expected a list "
            "of dicts in Detectron2's format: register a function that returns one"
        )
    _check_annotated(dicts, names)
    _check_image_folders(dicts)
    _report_empty_boxes(dicts)
    return dicts


def num_classes_of(dataset_names: Iterable[str]) -> Optional[int]:
    """Number of thing classes of the first data set that declares them, else None.

    A data set registered from a COCO JSON without metadata declares them once it has been loaded.
    """
    for name in dataset_names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None:
            return len(classes)
    return None


def _data_root() -> str:
    root = os.getenv("DETECTRON2_DATASETS")
    return f"DETECTRON2_DATASETS is {root}" if root else "DETECTRON2_DATASETS is unset: ./datasets"


def _explain(error: Exception, names: Iterable[str]) -> str:
    """One line on why the data sets could not be loaded: what, in which file, what to do."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename} does not exist ({_data_root()}); see datasets/README.md"
    files = [MetadataCatalog.get(name).get("json_file") for name in names]
    where = ", ".join(file for file in files if file) or ", ".join(names)
    if isinstance(error, json.JSONDecodeError):
        return f"{where} is not valid JSON ({error}): was it copied completely?"
    if str(error).startswith("No valid data found"):
        return f"{where} holds no image with an annotation that is not a crowd"
    if isinstance(error, KeyError) and "category_id" not in str(error):
        return f"{where} lacks the key {error}: is it in COCO's instances format?"
    said = " ".join(str(error.args[0] if error.args else error).split())[:MAX_ERROR_LENGTH]
    return f"{where} cannot be used: {said or type(error).__name__}"


def _check_annotated(dicts: List[dict], names: Iterable[str]) -> None:
    if not any(d.get("annotations") for d in dicts):
        raise UserError(
            f"DATASETS.TRAIN: no image of {', '.join(names)} has an annotation: "
            "training needs the instances file, not the image-info file of a test split"
        )


def _check_image_folders(dicts: List[dict]) -> None:
    """Look for one image per folder: enough to notice a wrong path, and quick on COCO."""
    samples = {os.path.dirname(d["file_name"]): d["file_name"] for d in dicts if "file_name" in d}
    for path in samples.values():
        if "://" not in path and not PathManager.isfile(path):
            raise UserError(
                f"DATASETS.TRAIN: image {path} does not exist ({_data_root()}); "
                "see datasets/README.md"
            )


def _report_empty_boxes(dicts: List[dict]) -> None:
    """Log how many boxes have no area inside their image: Detectron2's mapper drops them."""
    empty = total = 0
    for mode in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        rows = [
            (*a["bbox"], d["width"], d["height"])
            for d in dicts
            for a in d.get("annotations", ())
            if a.get("bbox_mode") == mode and not a.get("iscrowd", 0)
        ]
        if rows:
            empty += _count_empty(rows, mode)
            total += len(rows)
    if empty:
        logger.warning(
            f"{empty} of {total} boxes have no area inside their image; Detectron2 drops them"
        )


def _count_empty(rows: List[tuple], mode: BoxMode) -> int:
    """Count boxes, given as rows (4 coordinates, image width, image height), without area."""
    try:
        values = np.asarray(rows, dtype=np.float64).reshape(-1, 6)
    except ValueError as error:
        raise UserError(
            "DATASETS.TRAIN: an annotation has a 'bbox' that is not 4 numbers: correct the file"
        ) from error
    boxes, sizes = BoxMode.convert(values[:, :4], mode, BoxMode.XYXY_ABS), values[:, 4:]
    sides = np.minimum(boxes[:, 2:], sizes) - np.maximum(boxes[:, :2], 0)
    return int((~(sides > EMPTY_SIDE).all(1)).sum())

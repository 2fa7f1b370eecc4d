"""Load the training set once, and turn the usual troubles with data into one-line errors."""

import logging
import os
from typing import Callable, Collection, Iterable, List, Optional, Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from d2kd.data.annotations import EMPTY_SIDE
from d2kd.data.classes import class_names_of
from d2kd.data.images import refuse_outside
from d2kd.data.sets import (
    LOADING_ERRORS,
    data_root,
    findings_in_dicts,
    findings_in_file,
    has_annotation_file,
    quick_look,
    refuse_errors,
    why_not_loaded,
)
from d2kd.errors import UserError, nearest

logger = logging.getLogger(__name__)


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


def load_training_dicts(cfg, load: Optional[Callable[[], List[dict]]] = None) -> List[dict]:
    """Load the sets of DATASETS.TRAIN as Detectron2's training loader does, and check them.

    Args:
        cfg: of a run.
        load: does it in another way.

    Returns:
        dicts in Detectron2's format, filtered as the config says.

    Raises:
        UserError: unknown names, missing or corrupt files, no annotations, unknown categories.
    """
    check_dataset_names(cfg)
    names = cfg.DATASETS.TRAIN
    try:
        dicts = load() if load else _load_filtered(cfg)
    except UserError as error:
        raise UserError(f"DATASETS.TRAIN: {error}") from error
    except LOADING_ERRORS as error:
        raise UserError(f"DATASETS.TRAIN: {why_not_loaded(error, names)}") from error
    if not isinstance(dicts, list):
        raise UserError(
            f"DATASETS.TRAIN: {', '.join(names)} gives a {type(dicts).__name__}, expected a list "
            "of dicts in Detectron2's format: register a function that returns one"
        )
    _check_annotated(dicts, names)
    _check_inside(dicts, names, "DATASETS.TRAIN")
    _check_image_folders(dicts)
    _check_quickly(dicts, names, "DATASETS.TRAIN", cfg.RUN.SKIP_BAD_IMAGES if "RUN" in cfg else 0)
    _report_empty_boxes(dicts)
    return dicts


def _load_filtered(cfg) -> List[dict]:
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )


def _check_quickly(dicts: List[dict], names: Sequence[str], key: str, skipped: int = 0) -> None:
    """
    Args:
        skipped: how many images may be bad.
    """
    if not all(map(has_annotation_file, names)):
        # Several sets may have the same numbers for their images
        numbered = dicts if len(names) == 1 else [{**d, "image_id": i} for i, d in enumerate(dicts)]
        refuse_errors(findings_in_dicts(numbered, names[0]), key)
    bad = quick_look(dicts)
    if len(bad) > skipped:
        refuse_errors(bad, key)


def check_annotation_files(cfg, training: bool = True) -> None:
    """Looks into the files of the data sets of a config, before anything else reads them. What is
    dubious is logged.

    Args:
        cfg: of a run.
        training: look also into what is trained with, not only into what is evaluated.

    Raises:
        UserError: for what would end in a traceback later, or train wrongly in silence.
    """
    for key, names in (("TRAIN", cfg.DATASETS.TRAIN * training), ("TEST", cfg.DATASETS.TEST)):
        for name in names:
            if name in DatasetCatalog and has_annotation_file(name):
                masks = key == "TRAIN" and cfg.MODEL.MASK_ON
                findings = findings_in_file(name, key == "TEST", masks)
                refuse_errors(findings, f"DATASETS.{key}")


def check_evaluation(cfg, kinds: Optional[Collection[str]]) -> None:
    """Reads the sets of DATASETS.TEST, so that a run does not find out at its end that it cannot
    be evaluated.

    Args:
        cfg: of a run.
        kinds: of evaluators that there are; None if the config brings its own.

    Raises:
        UserError: unknown names or evaluators, missing or corrupt files, other classes than those
            that are trained.
    """
    check_dataset_names(cfg)
    for name in cfg.DATASETS.TEST:
        try:
            dicts = DatasetCatalog.get(name)
        except UserError as error:
            raise UserError(f"DATASETS.TEST: {error}") from error
        except LOADING_ERRORS as error:
            raise UserError(f"DATASETS.TEST: {why_not_loaded(error, [name])}") from error
        kind = MetadataCatalog.get(name).get("evaluator_type", "none")
        if kinds is not None and kind not in kinds:
            raise UserError(
                f"DATASETS.TEST names '{name}', whose evaluator_type is '{kind}': d2kd evaluates "
                f"{', '.join(kinds)}"
            )
        if not dicts:
            raise UserError(f"DATASETS.TEST: {name} holds no image")
        if not any("annotations" in d for d in dicts):
            logger.warning(f"{name} has no annotations: its evaluation saves detections only")
        _check_inside(dicts, [name], "DATASETS.TEST")
        _check_image_folders(dicts, "DATASETS.TEST")
        _check_same_classes(cfg.DATASETS.TRAIN[0], name)
        _check_quickly(dicts, [name], "DATASETS.TEST")


def _check_same_classes(train: str, test: str) -> None:
    """A class that one of two sets lacks would shift the numbers of all classes behind it."""
    learned, tested = class_names_of([train]), class_names_of([test])
    if not learned or not tested or learned == tested:
        return
    if len(learned) != len(tested):
        difference = f"{len(tested)} classes, {train} has {len(learned)}"
    else:
        i = next(i for i, pair in enumerate(zip(learned, tested)) if pair[0] != pair[1])
        difference = f"'{tested[i]}' as class {i}, {train} has '{learned[i]}'"
    raise UserError(
        f"DATASETS.TEST: {test} has {difference}: give both the same classes in the same order (in "
        "COCO's format, the same 'categories')"
    )


def num_classes_of(dataset_names: Iterable[str]) -> Optional[int]:
    """Number of thing classes of the first data set that declares them, else None.

    A data set registered from a COCO JSON without metadata declares them once it has been loaded.
    """
    for name in dataset_names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None:
            return len(classes)
    return None


def _check_annotated(dicts: List[dict], names: Iterable[str]) -> None:
    if not any(d.get("annotations") for d in dicts):
        raise UserError(
            f"DATASETS.TRAIN: no image of {', '.join(names)} has an annotation: "
            "training needs the instances file, not the image-info file of a test split"
        )


def _check_inside(dicts: List[dict], names: Iterable[str], key: str) -> None:
    """A name in an annotation file is somebody else's text: it must not lead out of the folder of
    the images. Data sets that declare no such folder chose their paths themselves."""
    roots = [MetadataCatalog.get(name).get("image_root") for name in names]
    if not all(roots):
        return
    refuse_outside(dicts, roots, key)


def _check_image_folders(dicts: List[dict], key: str = "DATASETS.TRAIN") -> None:
    """Look for one image per folder: enough to notice a wrong path, and quick on COCO."""
    samples = {os.path.dirname(d["file_name"]): d["file_name"] for d in dicts if "file_name" in d}
    for path in samples.values():
        if "://" not in path and not PathManager.isfile(path):
            raise UserError(
                f"{key}: image {path} does not exist ({data_root()}); see datasets/README.md"
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

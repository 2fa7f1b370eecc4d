"""Checks the data sets of a config before a run, and raises one-line errors."""

import logging
from typing import Callable, Iterable, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from d2kd.errors import UserError, nearest

from .classes import class_names_of
from .images import refuse_outside
from .sets import (
    check_image_sample,
    findings_in_dicts,
    findings_in_file,
    has_annotation_file,
    load_errors_explained,
    refuse_errors,
)

logger = logging.getLogger(__name__)


def check_dataset_names(cfg: CfgNode, training: bool = True) -> None:
    """Checks that the config names something to train with, or else to evaluate with, and that what
    it names is known.

    Raises:
        UserError: naming the key, the name and the nearest known one.
    """
    needed, example = ("TRAIN", "coco_2017_train") if training else ("TEST", "coco_2017_val")
    if not cfg.DATASETS[needed]:
        raise UserError(f"DATASETS.{needed} is empty: name a data set, e.g. ('{example}',)")
    for key in ("TRAIN", "TEST") if training else ("TEST",):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                known = nearest(name, DatasetCatalog.list())
                raise UserError(f"DATASETS.{key}: there is no data set '{name}'; {known}")


def load_training_dicts(
    cfg: CfgNode, load: Optional[Callable[[], List[dict]]] = None
) -> List[dict]:
    """Loads the sets of DATASETS.TRAIN as Detectron2's training loader does, and checks them.

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
        with load_errors_explained(names):
            dicts = load() if load else _load_filtered(cfg)
    except UserError as error:
        raise UserError(f"DATASETS.TRAIN: {error}") from error
    if not isinstance(dicts, list):
        raise UserError(
            f"DATASETS.TRAIN: {', '.join(names)} gives a {type(dicts).__name__}, expected a list "
            "of dicts in Detectron2's format: register a function that returns one"
        )
    _check_annotated(dicts, names)
    _check_inside(dicts, names, "DATASETS.TRAIN")
    masks = masks_needed(cfg, evaluated=False)
    _check_quickly(dicts, names, "DATASETS.TRAIN", masks, cfg.RUN.SKIP_BAD_IMAGES)
    return dicts


def _load_filtered(cfg: CfgNode) -> List[dict]:
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
    )


def masks_needed(cfg: CfgNode, evaluated: bool) -> str:
    """The form of masks that every annotation needs, see
    :func:`~d2kd.data.annotations.check_annotations`."""
    if not cfg.MODEL.MASK_ON:
        return ""
    return "bitmask" if evaluated else cfg.INPUT.MASK_FORMAT


def _check_quickly(
    dicts: List[dict],
    names: Sequence[str],
    key: str,
    masks: str,
    skipped: int = 0,
    evaluated: bool = False,
) -> None:
    """
    Args:
        masks: from :func:`masks_needed`.
        skipped: how many images may be bad.
        evaluated: the sets are evaluated with.
    """
    if not all(map(has_annotation_file, names)):
        # Several sets may have the same numbers for their images
        numbered = dicts if len(names) == 1 else [{**d, "image_id": i} for i, d in enumerate(dicts)]
        refuse_errors(findings_in_dicts(numbered, names[0], evaluated, masks), key)
    bad = check_image_sample(dicts)
    if len(bad) > skipped:
        refuse_errors(bad, key)


def check_annotation_files(cfg: CfgNode, training: bool = True) -> None:
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
                evaluated = key == "TEST"
                findings = findings_in_file(name, evaluated, masks_needed(cfg, evaluated))
                refuse_errors(findings, f"DATASETS.{key}")


def check_evaluation(
    cfg: CfgNode, training: bool = True, refuse_kind: Callable[[str], None] = lambda name: None
) -> None:
    """Reads the sets of DATASETS.TEST, so that a run does not find out at its end that it cannot
    be evaluated.

    Args:
        cfg: of a run.
        training: it is a run that trains, with the same classes.
        refuse_kind: raises if there is no evaluator for the set of that name, once it is loaded.

    Raises:
        UserError: unknown names, missing or corrupt files, other classes than those that are
            trained.
    """
    check_dataset_names(cfg, training)
    for name in cfg.DATASETS.TEST:
        try:
            with load_errors_explained([name]):
                dicts = DatasetCatalog.get(name)
        except UserError as error:
            raise UserError(f"DATASETS.TEST: {error}") from error
        refuse_kind(name)
        if not dicts:
            raise UserError(f"DATASETS.TEST: {name} holds no image")
        if not any("annotations" in d for d in dicts):
            logger.warning(f"{name} has no annotations: its evaluation saves detections only")
        _check_inside(dicts, [name], "DATASETS.TEST")
        if training:
            _check_same_classes(cfg.DATASETS.TRAIN[0], name)
        masks = masks_needed(cfg, evaluated=True)
        _check_quickly(dicts, [name], "DATASETS.TEST", masks, evaluated=True)


def _check_same_classes(train: str, test: str) -> None:
    """A class that one of two sets lacks would shift the numbers of all classes after it."""
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
        "COCO's format, the same 'categories'); training data of your own need validation data of "
        "your own, too (--val-json and --val-images, --val-voc or --val-yolo)"
    )


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

"""The detectors of runs, filled, and the images that they are shown on."""

import copy
from typing import List, NamedTuple, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import Instances

from d2kd.data.check import check_dataset_names
from d2kd.data.sets import load_errors_explained
from d2kd.distillation import TeacherStudent, build_model
from d2kd.errors import UserError
from d2kd.prediction import Predictor

from .facts import RunFacts


class Shown(NamedTuple):
    """Images of the evaluation set."""

    dicts: List[dict]  # in Detectron2's format
    metadata: object  # of the set


def teacher_student(facts: RunFacts) -> Optional[TeacherStudent]:
    """The pair of a run with the weights of its teacher, the student not filled; None of a plain
    run.

    Raises:
        UserError: if the teacher cannot be had.
    """
    model = build_model(on_this_machine(facts.cfg))
    return model if isinstance(model, TeacherStudent) else None


def on_this_machine(cfg: CfgNode) -> CfgNode:
    """A config whose device is here."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return cfg


def shown_images(cfg: CfgNode, number: int) -> Shown:
    """The first images of the evaluation set that have objects.

    Raises:
        UserError: if they cannot be had.
    """
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: there are no images to show")
    check_dataset_names(cfg)
    name = cfg.DATASETS.TEST[0]
    try:
        with load_errors_explained([name]):
            dicts = DatasetCatalog.get(name)
    except UserError as error:
        raise UserError(f"the images of {name} cannot be had: {error}") from error
    with_objects = [d for d in dicts if d.get("annotations")]
    return Shown(with_objects[:number], MetadataCatalog.get(name))


def with_objects(cfg: CfgNode, dicts: List[dict]) -> List[dict]:
    """Images with their objects as the training loader gives them, but as large as in evaluation,
    and not flipped.

    Raises:
        UserError: if an image cannot be read.
    """
    augmentations = utils.build_augmentation(cfg, is_train=False)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
    return [_mapped(mapper, d) for d in dicts]


def detections(predictor: Predictor, dicts: List[dict]) -> List[Instances]:
    """What a detector finds on images.

    Raises:
        UserError: if an image cannot be read.
    """
    return [predictor(predictor.read(d["file_name"])) for d in dicts]


def _mapped(mapper: DatasetMapper, entry: dict) -> dict:
    try:
        return mapper(copy.deepcopy(entry))
    except (OSError, utils.SizeMismatchError) as error:
        raise UserError(f"image {entry['file_name']} cannot be read: {error}") from error

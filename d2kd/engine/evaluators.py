"""The evaluator of a data set, by the set's kind."""

import os
from typing import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)

from d2kd.errors import UserError

from .coco_evaluation import coco_evaluator

# By kind of data set, from a config, the set's name and where to write
EVALUATORS = {
    "coco": coco_evaluator,
    "lvis": lambda cfg, name, folder: LVISEvaluator(name, output_dir=folder),
    "pascal_voc": lambda cfg, name, folder: PascalVOCDetectionEvaluator(name),
}


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """
    Raises:
        UserError: if there is none for that kind of data set.
    """
    refuse_without_evaluator(dataset_name)
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    return EVALUATORS[_kind_of(dataset_name)](cfg, dataset_name, folder)


def refuse_without_evaluator(dataset_name: str) -> None:
    """
    Raises:
        UserError: if there is no evaluator for that kind of data set.
    """
    kind = _kind_of(dataset_name)
    if kind not in EVALUATORS:
        raise UserError(
            f"DATASETS.TEST names '{dataset_name}', whose evaluator_type is '{kind}': d2kd "
            f"evaluates {', '.join(EVALUATORS)}"
        )


def add_missing_info(evaluators: Sequence[DatasetEvaluator]) -> None:
    """Lets COCO files without ``info`` do, with which some versions of pycocotools end in an error.

    Args:
        evaluators: of any kind, also several in one.
    """
    for evaluator in evaluators:
        if isinstance(evaluator, DatasetEvaluators):
            add_missing_info(evaluator._evaluators)
        elif isinstance(evaluator, COCOEvaluator):
            evaluator._coco_api.dataset.setdefault("info", {})


def _kind_of(dataset_name: str) -> str:
    return MetadataCatalog.get(dataset_name).get("evaluator_type", "none")

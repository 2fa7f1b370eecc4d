"""Evaluations before a run: of the annotations themselves, and of the teacher."""

import contextlib
import io
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.evaluation.evaluator import inference_context
from detectron2.structures import Boxes, BoxMode, Instances
from tqdm import tqdm

from d2kd.checkpoint import load_teacher_weights
from d2kd.data.bad_images import NamingLoader, NamingMapper
from d2kd.distillation import build_teacher_detector
from d2kd.engine import DistillTrainer
from d2kd.errors import UserError


def ap_of_annotations(cfg: CfgNode, name: str) -> Optional[float]:
    """The AP of detections that are the annotations: 100, if nothing is wrong with them or with the
    evaluator.

    Args:
        cfg: of a run; the evaluator may write into its ``OUTPUT_DIR``.
        name: of a data set.

    Returns:
        None if there is nothing to evaluate against.
    """
    evaluator = DistillTrainer.build_evaluator(cfg, name)
    evaluator.reset()
    for d in DatasetCatalog.get(name):
        evaluator.process([d], [{"instances": _perfect_detections(d)}])
    return _ap(evaluator)


def _perfect_detections(d: Dict[str, Any]) -> Instances:
    annotations = [a for a in d.get("annotations", ()) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    detections = Instances((d["height"], d["width"]))
    detections.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    detections.scores = torch.ones(len(boxes))
    detections.pred_classes = torch.tensor([a["category_id"] for a in annotations]).long()
    return detections


def ap_of_teacher(cfg: CfgNode, name: str, images: int) -> float:
    """The AP of the teacher with its weights, on images of the student's test size.

    Args:
        cfg: of a run that distils; the evaluator may write into its ``OUTPUT_DIR``.
        name: of a data set.
        images: how many of its images, evenly spread; 0 is all.

    Raises:
        UserError: if the teacher cannot be had, or its AP on a part of the set.
    """
    evaluator = DistillTrainer.build_evaluator(cfg, name)
    dicts = _spread(DatasetCatalog.get(name), images)
    if images and not isinstance(evaluator, COCOEvaluator):
        raise UserError(f"{name} cannot be evaluated in part, as COCO's can: leave --images out")
    source = build_teacher_detector(cfg)
    load_teacher_weights(source.detector, source.weights, source.input_format)
    teacher = source.detector.to(cfg.MODEL.DEVICE)
    mapper = DatasetMapper(cfg, is_train=False, image_format=source.input_format)
    loader = build_detection_test_loader(
        dicts, mapper=NamingMapper(mapper), num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    evaluator.reset()
    with inference_context(teacher), torch.no_grad():
        for inputs in tqdm(NamingLoader(loader), desc="teacher", unit="image", disable=None):
            evaluator.process(inputs, teacher(inputs))
    ap = _ap(evaluator, {"img_ids": [d["image_id"] for d in dicts]} if images else {})
    if ap is None:
        raise UserError(f"{name} has nothing to evaluate the teacher against")
    return ap


def _spread(dicts: Sequence[Dict[str, Any]], number: int) -> List[Dict[str, Any]]:
    if not 0 < number < len(dicts):
        return list(dicts)
    return [dicts[i * len(dicts) // number] for i in range(number)]


def _ap(evaluator: DatasetEvaluator, options: Optional[Dict[str, Any]] = None) -> Optional[float]:
    with contextlib.redirect_stdout(io.StringIO()):  # COCO's prints its tables
        results = evaluator.evaluate(**(options or {})) or {}
    return results.get("bbox", {}).get("AP")

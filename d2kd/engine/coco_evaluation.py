"""COCO's evaluation by faster-coco-eval, where it is installed: pycocotools' numbers, sooner."""

import json
import logging
import os
from typing import Any, Dict, List

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager

from d2kd.errors import UserError

try:
    import faster_coco_eval
except ImportError:
    faster_coco_eval = None

logger = logging.getLogger(__name__)


class FasterCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator, whose detections faster-coco-eval compares with the annotations."""

    def __init__(self, dataset_name: str, **kwargs: Any):
        """
        Args:
            dataset_name: a registered data set.
            kwargs: as for ``COCOEvaluator``, without ``use_fast_impl``: Detectron2's own compiled
                evaluation is not used.
        """
        super().__init__(dataset_name, use_fast_impl=False, **kwargs)

    def _eval_predictions(self, predictions, img_ids=None):
        detections = self._with_ids_of_file(predictions)
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with PathManager.open(path, "w") as f:
                json.dump(detections, f)
        if not self._do_evaluation:
            logger.info("The data set has no annotations to evaluate against")
            return
        logger.debug(f"Evaluating with faster-coco-eval {faster_coco_eval.__version__}")
        numbers = self._image_numbers()
        ground_truth = faster_coco_eval.COCO(_numbered(self._coco_api.dataset, numbers))
        if img_ids is not None:
            img_ids = [numbers[i] for i in img_ids]
        detections = [{**d, "image_id": numbers[d["image_id"]]} for d in detections]
        for task in sorted(self._tasks or self._tasks_from_predictions(detections)):
            evaluated = self._evaluated(ground_truth, detections, task, img_ids)
            names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(evaluated, task, class_names=names)

    def _image_numbers(self) -> Dict[Any, int]:
        """Whole numbers for images, whose ids may be names; in the order of the ids, by which
        detections of equal scores are ranked."""
        return {name: i for i, name in enumerate(sorted(self._coco_api.getImgIds()), start=1)}

    def _with_ids_of_file(self, predictions: List[Dict]) -> List[Dict[str, Any]]:
        """The detections with the category ids of the annotation file in place of the model's."""
        detections = [detection for p in predictions for detection in p["instances"]]
        if not hasattr(self._metadata, "thing_dataset_id_to_contiguous_id"):
            return detections
        ids = {v: k for k, v in self._metadata.thing_dataset_id_to_contiguous_id.items()}
        unknown = {d["category_id"] for d in detections}.difference(ids)
        if unknown:
            raise UserError(
                f"a detection has class {min(unknown)} (counted from 0), but the data set "
                f"'{self._metadata.name}' has {len(ids)} classes: give a detector of its classes"
            )
        return [{**d, "category_id": ids[d["category_id"]]} for d in detections]

    def _evaluated(self, ground_truth, detections, task, img_ids):
        """The ``COCOeval`` of a task, summarized; None without detections."""
        if not detections:
            return None
        # Loading adds to the entries. With a box a mask would count with the area of the box.
        left_out = ("bbox",) if task == "segm" else ()
        entries = [{k: v for k, v in d.items() if k not in left_out} for d in detections]
        evaluation = faster_coco_eval.COCOeval_faster(
            ground_truth, ground_truth.loadRes(entries), task, print_function=print
        )
        # For keypoints it takes the categories that have images alone, unlike pycocotools
        evaluation.params.catIds = sorted(ground_truth.getCatIds())
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        if task == "keypoints":
            self._set_sigmas(evaluation.params, len(detections[0]["keypoints"]) // 3)
        else:
            evaluation.params.maxDets = self._max_dets_per_image
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation

    def _set_sigmas(self, params, num_keypoints: int) -> None:
        """
        Raises:
            UserError: if there is not one of OKS's sigmas for every keypoint.
        """
        if self._kpt_oks_sigmas:
            params.kpt_oks_sigmas = np.array(self._kpt_oks_sigmas)
        if len(params.kpt_oks_sigmas) != num_keypoints:
            raise UserError(
                f"TEST.KEYPOINT_OKS_SIGMAS has {len(params.kpt_oks_sigmas)} numbers (without any, "
                f"COCO's), but the detections have {num_keypoints} keypoints: give one for each"
            )


def _numbered(dataset: Dict[str, Any], numbers: Dict[Any, int]) -> Dict[str, Any]:
    """Annotations in COCO's format with numbers in place of the ids of images. Those of images that
    are not listed count for nothing, as with pycocotools."""
    return {
        **dataset,
        "images": [{**image, "id": numbers[image["id"]]} for image in dataset["images"]],
        "annotations": [
            {**annotation, "image_id": numbers[annotation["image_id"]]}
            for annotation in dataset.get("annotations", ())
            if annotation["image_id"] in numbers
        ],
    }


def coco_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str) -> COCOEvaluator:
    """
    Args:
        cfg: of a run.
        dataset_name: a registered data set.
        output_dir: where detections are written, and the annotations of a set without a file.

    Returns:
        an evaluator of Detectron2's kind, which computes COCO's metrics.
    """
    _write_annotations(dataset_name, output_dir)
    options = {"output_dir": output_dir, "kpt_oks_sigmas": cfg.TEST.KEYPOINT_OKS_SIGMAS}
    if faster_coco_eval is None:
        logger.debug("pycocotools evaluates; d2kd[fast-eval] would be faster, with equal numbers")
        return COCOEvaluator(dataset_name, **options)
    return FasterCOCOEvaluator(dataset_name, **options)


def _write_annotations(dataset_name: str, output_dir: str) -> None:
    """Writes those of a set that is registered without a file, as Detectron2's evaluator does, but
    in every process that evaluates: the file of an earlier one may be out of date."""
    metadata = MetadataCatalog.get(dataset_name)
    written = getattr(metadata, "json_file", None)
    if written and not os.path.isfile(written):  # into a folder that is gone
        del metadata.json_file
    if not hasattr(metadata, "json_file"):
        metadata.json_file = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
        convert_to_coco_json(dataset_name, metadata.json_file, allow_cached=False)

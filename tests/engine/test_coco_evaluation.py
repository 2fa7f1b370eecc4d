"""faster-coco-eval gives the digits of pycocotools, in the form that Detectron2 gives them."""

import contextlib
import dataclasses
import logging
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.structures import Boxes, BoxMode, Instances
from toys import detector

from d2kd.checkpoint import load_trained_weights
from d2kd.data.builtin import register_shapes
from d2kd.data.shapes import SPECS
from d2kd.engine import coco_evaluation
from d2kd.engine.coco_evaluation import FasterCOCOEvaluator, coco_evaluator
from d2kd.engine.evaluators import add_missing_info
from d2kd.errors import UserError

sys.path.append(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir, "tools"))
from compare_evaluators import evaluate, random_annotations, random_detections, register

EXACT = {"rel": 1e-12, "nan_ok": True}


class Recorded:
    """Keeps all numbers of COCO's summary, of which Detectron2 passes on six."""

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        self.stats = {**getattr(self, "stats", {}), iou_type: coco_eval.stats}
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


class Pycocotools(Recorded, COCOEvaluator):
    def __init__(self, name, **kwargs):
        super().__init__(name, use_fast_impl=False, **kwargs)


class Faster(Recorded, FasterCOCOEvaluator):
    pass


def assert_equal(name, detections, folder, tasks=("bbox",), img_ids=None, **options):
    """All numbers of both evaluators, by task and class, and the files that they write."""
    made = []
    for kind in (Pycocotools, Faster):
        evaluator = kind(name, output_dir=str(folder), **options)
        results = evaluate(evaluator, detections, img_ids)
        text = (folder / "coco_instances_results.json").read_text()
        made.append((results, evaluator.stats, text))
    (theirs, their_stats, their_text), (ours, our_stats, our_text) = made
    assert set(ours) == set(theirs) == set(tasks) and our_text == their_text
    for task in tasks:
        assert list(ours[task]) == list(theirs[task])
        assert ours[task] == pytest.approx(theirs[task], **EXACT)
        assert our_stats[task] == pytest.approx(their_stats[task], **EXACT)
        assert len(our_stats[task]) == (10 if task == "keypoints" else 12)
        assert 0 < ours[task]["AP"] < 100


@pytest.fixture
def made(tmp_path, request):
    """A registered data set at random and detections for it."""
    random = np.random.default_rng(3)
    data = random_annotations(30, 6, 240, random)
    data["categories"].append({"id": 13, "name": "not in any image"})
    yield request.node.name, data, random_detections(data, 12, random), tmp_path
    MetadataCatalog.pop(request.node.name)


@pytest.mark.parametrize("max_dets_per_image", [None, 5, 300])
def test_boxes(made, max_dets_per_image):
    name, data, detections, folder = made
    register(name, data, str(folder / "annotations.json"))
    assert_equal(name, detections, folder, max_dets_per_image=max_dets_per_image)


def test_a_part_of_the_images(made):
    name, data, detections, folder = made
    register(name, data, str(folder / "annotations.json"))
    assert_equal(name, detections, folder, img_ids=[3, 8, 11, 20])


def test_images_with_names(made):
    name, data, detections, folder = made
    for image in data["images"]:
        image["id"] = str(image["id"])  # in another order than the numbers
    for annotation in data["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    named = [({"image_id": np.str_(x["image_id"])}, found) for x, found in detections]
    register(name, data, str(folder / "annotations.json"))
    assert_equal(name, named, folder)
    assert_equal(name, named, folder, img_ids=["3", "8", "11", "20"])


def test_masks(made):
    name, data, detections, folder = made
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        corners = [x, y, x + w, y + h / 3, x + w / 2, y + h]
        annotation["segmentation"], annotation["area"] = [corners], w * h / 2
        if annotation["iscrowd"]:
            counts = [640 * 30, 640 * 20, 640 * 430]
            annotation["segmentation"] = {"counts": counts, "size": [480, 640]}
    for _, output in detections:
        instances = output["instances"]
        instances.pred_masks = torch.zeros(len(instances), 480, 640, dtype=torch.bool)
        for mask, box in zip(instances.pred_masks, instances.pred_boxes.tensor.int().clamp(0)):
            mask[box[1] : box[3] - (box[3] - box[1]) // 3, box[0] : box[2] + 1] = True
    register(name, data, str(folder / "annotations.json"))
    assert_equal(name, detections, folder, ("bbox", "segm"))


@pytest.mark.parametrize("sigmas", [(), [0.05, 0.1, 0.2]])
def test_keypoints(made, sigmas):
    name, data, detections, folder = made
    random, count = np.random.default_rng(4), len(sigmas) or 17
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        seen = random.integers(3, size=(count, 1)) * (random.random() < 0.9)
        annotation["num_keypoints"] = int((seen > 0).sum())
        points = random.random((count, 2)) * [w, h] + [x, y]
        annotation["keypoints"] = np.concatenate([points, seen], 1).flatten().tolist()
    for entry, output in detections:
        near = [a for a in data["annotations"] if a["image_id"] == entry["image_id"]]
        points = torch.zeros(len(output["instances"]), count, 3)
        for row, annotation in zip(points, near):
            row += torch.tensor(annotation["keypoints"]).reshape(count, 3)
            row[:, :2] += torch.tensor(random.normal(0, 3, (count, 2)) + 0.5)
        output["instances"].pred_keypoints = points
    register(name, data, str(folder / "annotations.json"))
    copies = [(entry, {"instances": copy_of(output)}) for entry, output in detections]
    assert_equal(name, copies, folder, ("bbox", "keypoints"), kpt_oks_sigmas=sigmas)


class copy_of:
    """Detectron2 shifts the keypoints of what it is given, in place."""

    def __init__(self, output):
        self._instances = output["instances"]

    def to(self, device):
        copy = Instances(self._instances.image_size, **self._instances.get_fields())
        copy.pred_keypoints = copy.pred_keypoints.clone()
        return copy


def test_detections_of_a_detector_on_the_embedded_data(tmp_path):
    spec = SPECS["shapes_tiny"]
    few = dataclasses.replace(spec, name="shapes_few", images={"train": 1, "val": 40})
    register_shapes(few, str(tmp_path))
    dicts = DatasetCatalog.get("shapes_few_val")
    name = "shapes/baselines/fcos_tiny_teacher.yaml"
    model = detector(name).eval()
    load_trained_weights(model, "d2kd://fcos_tiny_teacher.pth", "weights", name)
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    inputs = [mapper(d) for d in dicts]
    with torch.no_grad():
        detections = [(entry, model([entry])[0]) for entry in inputs]
    assert_equal("shapes_few_val", detections, tmp_path)


def test_no_detections_and_no_annotations(made):
    name, data, _, folder = made
    nothing = Instances((480, 640))
    nothing.pred_boxes, nothing.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
    nothing.pred_classes = torch.zeros(0, dtype=torch.long)
    register(name, data, str(folder / "annotations.json"))
    empty = [({"image_id": 0}, {"instances": nothing})]
    results = evaluate(FasterCOCOEvaluator(name), empty)
    assert list(results["bbox"]) == list(evaluate(COCOEvaluator(name), empty)["bbox"])
    assert all(np.isnan(value) for value in results["bbox"].values())
    del data["annotations"]
    register(name, data, str(folder / "annotations.json"))
    assert evaluate(FasterCOCOEvaluator(name), empty) == {}


def test_a_class_that_the_data_lacks_and_a_wrong_number_of_sigmas(made):
    name, data, detections, folder = made
    register(name, data, str(folder / "annotations.json"))
    detections[2][1]["instances"].pred_classes[1] = 9
    with pytest.raises(UserError, match="has class 9 .* has 7 classes"):
        evaluate(FasterCOCOEvaluator(name), detections)
    detections[2][1]["instances"].pred_classes[1] = 0
    for _, output in detections:
        output["instances"].pred_keypoints = torch.zeros(12, 5, 3)
    with pytest.raises(UserError, match="TEST.KEYPOINT_OKS_SIGMAS has 17 .* have 5 keypoints"):
        evaluate(FasterCOCOEvaluator(name), detections)


def test_it_is_used_where_it_is_installed_and_the_log_says_so(made, monkeypatch, caplog):
    name, data, detections, folder = made
    register(name, data, str(folder / "annotations.json"))
    caplog.set_level(logging.DEBUG, "d2kd")
    with_it = evaluate(coco_evaluator(get_cfg(), name, str(folder)), detections)
    assert "Evaluating with faster-coco-eval" in caplog.text
    monkeypatch.setattr(coco_evaluation, "faster_coco_eval", None)
    evaluator = coco_evaluator(get_cfg(), name, str(folder))
    assert type(evaluator) is COCOEvaluator and "pycocotools evaluates" in caplog.text
    assert evaluate(evaluator, detections)["bbox"] == pytest.approx(with_it["bbox"], **EXACT)


def test_an_annotation_of_an_image_that_is_not_listed_counts_for_nothing(made):
    name, data, detections, folder = made
    data["annotations"].append({**data["annotations"][0], "id": 10**6, "image_id": 10**6})
    register(name, data, str(folder / "annotations.json"))
    ours = evaluate(FasterCOCOEvaluator(name), detections)["bbox"]
    assert ours == pytest.approx(evaluate(COCOEvaluator(name), detections)["bbox"], **EXACT)


@pytest.mark.parametrize("fast", [True, False])
def test_a_file_without_info_will_do(made, monkeypatch, fast):
    name, data, detections, folder = made
    data.pop("info", None)
    register(name, data, str(folder / "annotations.json"))
    if not fast:
        monkeypatch.setattr(coco_evaluation, "faster_coco_eval", None)
    evaluator = coco_evaluator(get_cfg(), name, None)
    assert isinstance(evaluator, FasterCOCOEvaluator) == fast
    add_missing_info([DatasetEvaluators([evaluator])])
    assert evaluator._coco_api.dataset["info"] == {}
    assert 0 < evaluate(evaluator, detections)["bbox"]["AP"] < 100


@contextlib.contextmanager
def one_image(name, box):
    """Registers a set of one image and one object, without a file; yields what finds it."""
    entry = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    image = {"file_name": "1.png", "image_id": 1, "height": 50, "width": 50}
    DatasetCatalog.register(name, lambda: [{**image, "annotations": [entry]}])
    MetadataCatalog.get(name).thing_classes = ["thing"]
    found = Instances((50, 50))
    found.pred_boxes = Boxes(torch.tensor([box], dtype=torch.float32))
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
    yield [({"image_id": 1}, {"instances": found})]
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_annotations_of_a_set_without_a_file_are_those_of_today(tmp_path):
    """Those that an earlier process wrote for the evaluator are not read."""
    name = "annotations_of_today"
    for box in ([0, 0, 10, 10], [20, 20, 30, 30]):
        with one_image(name, box) as detections:
            evaluator = coco_evaluator(get_cfg(), name, str(tmp_path))
            assert evaluate(evaluator, detections)["bbox"]["AP"] == 100


def test_annotations_that_are_gone_are_written_again(tmp_path):
    name = "annotations_that_are_gone"
    with one_image(name, [0, 0, 10, 10]) as detections:
        for folder in (tmp_path / "a", tmp_path / "b"):
            evaluator = coco_evaluator(get_cfg(), name, str(folder))
            assert evaluate(evaluator, detections)["bbox"]["AP"] == 100
            shutil.rmtree(folder)


def test_sigmas_of_keypoints_are_those_of_the_config(made):
    name, data, detections, folder = made
    register(name, data, str(folder / "annotations.json"))
    cfg = get_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 5
    for _, output in detections:
        output["instances"].pred_keypoints = torch.zeros(12, 5, 3)
    assert coco_evaluator(cfg, name, str(folder))._kpt_oks_sigmas == [0.1] * 5

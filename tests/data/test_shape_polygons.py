"""The outlines of the embedded data as COCO polygons, from the drawing to mask AP."""

import json
from dataclasses import replace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances, PolygonMasks
from small_shapes import SMALL
from toys import config, step

from d2kd.data import shapes
from d2kd.data.outlines import OUTLINES, keyhole
from d2kd.data.shapes import SHAPES, SHAPES_TINY, draw_image
from d2kd.data.shapes_files import annotation_file, prepare_shapes
from d2kd.distillation import build_detector


def rasterised(segmentation, height, width):
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(segmentation, height, width)))


def annotations_of(folder, split="train"):
    with open(annotation_file(str(folder), split)) as file:
        return json.load(file)["annotations"]


@pytest.mark.parametrize("name", sorted(OUTLINES))
def test_polygons_rasterise_to_the_drawn_shape(name):
    """Whatever the size, they differ from it only in pixels that the outline cuts."""
    spec = replace(SHAPES_TINY, classes=(name,), sizes=((300, 300),), radius=(7, 100))
    for index in range(10):
        _, objects = draw_image(spec, 1, "train", index)
        for label, box, contours in objects:
            covered = shapes._cover(contours, 0, 0, 300, 300)
            mask = rasterised([keyhole(contours).ravel().tolist()], 300, 300) > 0
            assert label == 0 and mask[covered == 1].all() and not mask[covered == 0].any()
            if (box[2:] - box[:2]).min() > 64:  # else, these pixels are many
                drawn = covered > 0.5
                assert (drawn & mask).sum() / (drawn | mask).sum() > 0.95


@pytest.mark.parametrize("name", ["ring", "frame"])
def test_a_hole_is_no_part_of_the_shape(name):
    outer, hole = (np.asarray(c) * 40 + 50 for c in OUTLINES[name])
    polygon = keyhole([outer, hole])
    assert rasterised([polygon.ravel()], 100, 100)[50, 50] == 0
    areas = [PolygonMasks([[p.ravel()]]).area().item() for p in (polygon, outer, hole)]
    assert areas[0] == pytest.approx(areas[1] - areas[2])


@pytest.mark.parametrize("spec", [SHAPES_TINY, SHAPES], ids=lambda spec: spec.name)
def test_polygons_lie_inside_the_image_and_fill_the_box(spec, tmp_path):
    prepare_shapes(replace(spec, images={"train": 40, "val": 1}), str(tmp_path / "set"))
    with open(annotation_file(str(tmp_path / "set"), "train")) as file:
        sizes = {r["id"]: (r["width"], r["height"]) for r in json.load(file)["images"]}
    for annotation in annotations_of(tmp_path / "set"):
        [polygon] = annotation["segmentation"]
        points = np.reshape(polygon, (-1, 2))
        x, y, w, h = annotation["bbox"]
        assert np.allclose([*points.min(0), *points.max(0)], [x, y, x + w, y + h], atol=1e-9)
        assert (points >= 0).all() and (points <= sizes[annotation["image_id"]]).all()


def test_detectron2_reads_the_polygons(tmp_path):
    prepare_shapes(SMALL, str(tmp_path / "small"))
    json_file = annotation_file(str(tmp_path / "small"), "train")
    dicts = load_coco_json(json_file, str(tmp_path / "small" / "train"))
    read = [a["segmentation"] for d in dicts for a in d["annotations"]]
    assert read == [a["segmentation"] for a in annotations_of(tmp_path / "small")]


def test_mask_rcnn_learns_from_the_set(toy_dataset):
    cfg = config("shapes/baselines/mask_rcnn_tiny.yaml")
    mapper = DatasetMapper(cfg, is_train=True)
    inputs = [mapper(d) for d in DatasetCatalog.get(toy_dataset[0])[:2]]
    torch.manual_seed(0)
    model = build_detector(cfg)
    losses = step(model, inputs)
    assert torch.isfinite(losses["loss_mask"]) and losses["loss_mask"] > 0
    losses["loss_mask"].backward()
    assert model.roi_heads.mask_head.predictor.weight.grad.abs().sum() > 0


def test_perfect_masks_score_100_in_coco_evaluation(toy_dataset, tmp_path):
    evaluator = COCOEvaluator(toy_dataset[1], output_dir=str(tmp_path))
    evaluator.reset()
    for d in DatasetCatalog.get(toy_dataset[1]):
        size, annotations = (d["height"], d["width"]), d["annotations"]
        boxes = torch.tensor([a["bbox"] for a in annotations])
        instances = Instances(size)
        instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        instances.scores = torch.ones(len(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
        masks = [rasterised(a["segmentation"], *size) for a in annotations]
        instances.pred_masks = torch.as_tensor(np.stack(masks)).bool()
        evaluator.process([d], [{"instances": instances}])
    results = evaluator.evaluate()
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP"] == pytest.approx(100)

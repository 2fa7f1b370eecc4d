"""Sets registered in Python: what Detectron2 trains on passes, what it cannot evaluate is told."""

import copy
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from d2kd.check.evaluations import ap_of_annotations
from d2kd.config import default_config
from d2kd.data.check import check_evaluation, load_training_dicts
from d2kd.data.sets import inspect_dataset
from d2kd.errors import UserError

NAME = "numpy_dicts"
BOX = {"bbox": [1, 2, 20, 25], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
MASK = np.zeros((30, 40), np.uint8, order="F")
MASK[2:25, 1:20] = 1
RUN_LENGTHS = mask_util.encode(MASK)  # counts are bytes
POLYGON = [[1.0, 2, 20, 2, 20, 25]]
NUMPY_BOX = [np.int64(x) for x in BOX["bbox"]]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Registers a set of one image; the config of a run on it."""

    monkeypatch.chdir(tmp_path)

    def register(annotation=None, masks=False, **image):
        Image.new("RGB", (40, 30)).save(tmp_path / "1.png")
        d = {"file_name": str(tmp_path / "1.png"), "width": 40, "height": 30, "image_id": 5}
        d = {**d, **image, "annotations": [{**BOX, **(annotation or {})}]}
        DatasetCatalog.register(NAME, lambda: copy.deepcopy([d]))
        MetadataCatalog.get(NAME).set(thing_classes=["cat"], evaluator_type="coco")
        cfg = default_config()
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (NAME,)
        cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = masks, "bitmask"
        cfg.INPUT.MIN_SIZE_TRAIN = (30,)
        cfg.OUTPUT_DIR = str(tmp_path / "run")
        return cfg

    yield register
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


def findings(masks=False, evaluated=False):
    return [f.kind for f in inspect_dataset(NAME, evaluated, "bitmask" if masks else "").findings]


@pytest.mark.parametrize(
    "changes",
    [
        {"annotation": {"bbox": NUMPY_BOX}},  # as in Detectron2's own tutorial
        {"annotation": {"bbox": np.array(BOX["bbox"])}},
        {"annotation": {"category_id": np.int64(0), "iscrowd": np.int64(0)}},
        {"width": np.int64(40), "height": np.int64(30)},
        {"width": np.float64(40), "height": np.float64(30)},
        {"file_name": Path("1.png")},
        {"annotation": {"segmentation": RUN_LENGTHS}, "masks": True},
        {"annotation": {"segmentation": {**RUN_LENGTHS, "size": (30, 40)}}, "masks": True},
        {"annotation": {"segmentation": POLYGON}, "masks": True},
    ],
)
def test_what_detectron2_trains_on_and_evaluates_passes(config, changes):
    masks = changes.get("masks", False)
    cfg = config(**changes)
    [d] = load_training_dicts(cfg)
    assert len(DatasetMapper(cfg, is_train=True)(d)["instances"]) == 1
    check_evaluation(cfg)
    assert findings(masks) == findings(masks, evaluated=True) == []
    assert ap_of_annotations(cfg, NAME) == pytest.approx(100)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": np.int64(5)},
        {"annotation": {"segmentation": {**RUN_LENGTHS, "size": np.array([30, 40])}}},
        {"annotation": {"segmentation": [np.array(POLYGON[0])]}},
    ],
)
def test_numbers_that_are_trained_on_but_not_written_as_json(config, changes):
    masks = "annotation" in changes
    cfg = config(masks=masks, **changes)
    assert len(load_training_dicts(cfg)) == 1 and findings(masks) == []
    with pytest.raises(
        UserError, match=f"DATASETS.TEST: {NAME}: image 5: '.*by .tolist()"
    ) as error:
        check_evaluation(cfg)
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="not JSON serializable"):  # what it is refused for
        ap_of_annotations(cfg, NAME)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"width": 40.0}, r"\[40.0, 30\], which the evaluation of masks needs without a decimal"),
        (
            {"annotation": {"segmentation": {**RUN_LENGTHS, "size": [30.0, 40.0]}}},
            r"the 'size' \[30, 40\], in integers",
        ),
    ],
)
def test_where_masks_are_evaluated_sizes_are_integers(config, changes, words):
    cfg = config(masks=True, **{"annotation": {"segmentation": RUN_LENGTHS}, **changes})
    assert len(load_training_dicts(cfg)) == 1
    with pytest.raises(UserError, match=f"DATASETS.TEST: {NAME}: .*{words}"):
        check_evaluation(cfg)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"width": 40.5}, "'width' and 'height' are .*expected pixels"),
        ({"annotation": {"bbox": np.array([1, 2, 3])}}, r"'bbox' is \[1, 2, 3\]"),
        ({"annotation": {"bbox": np.full(4, np.nan)}}, r"'bbox' is \[nan, nan"),
        ({"annotation": {"segmentation": MASK}, "masks": True}, "'segmentation' is a ndarray"),
        (
            {"annotation": {"segmentation": {**RUN_LENGTHS, "size": [3, 4]}}, "masks": True},
            "expected 'counts' and the 'size'",
        ),
    ],
)
def test_faults_are_told(config, changes, words):
    with pytest.raises(UserError, match=f"DATASETS.TRAIN: {NAME}: .*{words}") as error:
        load_training_dicts(config(**changes))
    assert "\n" not in str(error.value)

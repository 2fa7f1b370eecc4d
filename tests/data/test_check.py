import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from d2kd.config import default_config
from d2kd.data.check import load_training_dicts
from d2kd.data.classes import class_names_of
from d2kd.data.sets import findings_in_file
from d2kd.errors import UserError

NAME = "check_train"


def coco(boxes=((2, 2, 10, 10),), category=1, file_name="1.png"):
    """A COCO JSON of one 40 × 30 image."""
    return {
        "images": [{"id": 1, "file_name": file_name, "width": 40, "height": 30}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": category, "bbox": list(b), "iscrowd": 0}
            for i, b in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


@pytest.fixture
def check(tmp_path):
    """Writes a JSON (or text, or nothing), registers it, loads it."""

    def run(content, filter_empty=True, image=True, train=(NAME,), test=()):
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / "instances.json").write_text(text)
        if image:
            Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "1.png")
        register_coco_instances(NAME, {}, str(tmp_path / "instances.json"), str(tmp_path))
        cfg = default_config()
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filter_empty
        return load_training_dicts(cfg)

    yield run
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def test_a_good_set_is_loaded_once_as_detectron2_does(check, monkeypatch):
    calls = []
    get = DatasetCatalog.get
    monkeypatch.setattr(
        "detectron2.data.build.DatasetCatalog.get", lambda name: calls.append(name) or get(name)
    )
    dicts = check(coco())
    assert calls == [NAME]
    assert len(dicts) == 1 and dicts[0]["annotations"][0]["category_id"] == 0
    assert len(class_names_of([NAME])) == 2


def test_names_may_wander_within_the_folder(check):
    assert len(check(coco(file_name="a/../1.png"))) == 1


def test_classes_are_unknown_without_metadata():
    DatasetCatalog.register("check_bare", lambda: [])
    try:
        assert class_names_of(["check_bare"]) == ()
    finally:
        DatasetCatalog.remove("check_bare")
        MetadataCatalog.remove("check_bare")


MISSING_IMAGES = {k: v for k, v in coco().items() if k != "images"}
MISSING_CATEGORIES = {k: v for k, v in coco().items() if k != "categories"}


@pytest.mark.parametrize(
    "content, options, words",
    [
        (coco(), {"train": ()}, "DATASETS.TRAIN is empty"),
        (coco(), {"train": ("check_trian",)}, "DATASETS.TRAIN.*check_trian.*'check_train'"),
        (coco(), {"test": ("check_tran",)}, "DATASETS.TEST.*check_tran.*'check_train'"),
        (None, {}, "instances.json does not exist .*DETECTRON2_DATASETS"),
        (coco(), {"image": False}, "1.png.* does not exist: is its 'file_name' relative"),
        (coco(file_name="none/1.png"), {}, "1.png.* does not exist .*DETECTRON2_DATASETS"),
        ("\ufeff" + json.dumps(coco()), {}, "begins with a byte-order mark: save it as UTF-8"),
        (json.dumps(coco())[:-20], {}, "instances.json is not valid JSON"),
        ("[]", {}, "instances.json"),
        (MISSING_IMAGES, {}, "instances.json"),
        (MISSING_CATEGORIES, {}, "instances.json lacks the key 'categories'"),
        (coco(boxes=()), {}, "instances.json holds no image with an annotation"),
        (coco(boxes=()), {"filter_empty": False}, "no image of check_train has an annotation"),
        (coco(category=9), {}, "instances.json.*category_id=9"),
        (coco(boxes=((),)), {}, "instances.json.*empty 'bbox'"),
        (coco(file_name="../1.png"), {}, r"/\.\./1.png' is outside of the image folder"),
        (coco(file_name="/etc/1.png"), {}, "'/etc/1.png' is outside of the image folder"),
    ],
)
def test_trouble_is_told_in_one_line(check, content, options, words):
    with pytest.raises(UserError, match=words) as error:
        check(content, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_boxes_without_area_are_counted_as_detectron2_drops_them(check):
    from detectron2.data import DatasetMapper

    boxes = [(2, 2, 10, 10), (30, 20, 30, 30), (5, 5, 0, 4), (50, 5, 4, 4), (-9, 1, 5, 5)]
    [d] = check(coco(boxes))
    kinds = [finding.kind for finding in findings_in_file(NAME, evaluated=False, masks="")]
    assert kinds.count("box without area") + kinds.count("box outside of its image") == 3
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    assert len(mapper(d)["instances"]) == 2


def test_other_peoples_bugs_keep_their_traceback():
    def broken():
        raise ZeroDivisionError

    DatasetCatalog.register("check_broken", broken)
    cfg = default_config()
    cfg.DATASETS.TRAIN = ("check_broken",)
    try:
        with pytest.raises(ZeroDivisionError):
            load_training_dicts(cfg)
    finally:
        DatasetCatalog.remove("check_broken")

"""Data sets that a config describes by their files."""

import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2kd.checkpoint.student_config import student_config
from d2kd.config import read_config
from d2kd.data.check import check_evaluation
from d2kd.data.described import register_described
from d2kd.errors import UserError

FCOS = "shapes/baselines/fcos_tiny.yaml"
# Ids with gaps, and not in the file's order
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def write(path, categories=CATEGORIES, category_id=7):
    (path.parent / "images").mkdir(exist_ok=True)
    (path.parent / "images" / "1.jpg").touch()
    image = {"id": 1, "file_name": "1.jpg", "width": 32, "height": 24}
    box = {"bbox": [1, 2, 10, 8], "area": 80, "iscrowd": 0, "category_id": category_id}
    annotations = [{"id": 1, "image_id": 1, **box}]
    content = {"images": [image], "categories": categories, "annotations": annotations}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return {"json": str(path), "images": str(path.parent / "images")}


@pytest.fixture
def entry(tmp_path):
    return write(tmp_path / "mine.json")


def read(train, test=(), *opts):
    data = ["DATASETS.TRAIN", repr([train]), "DATASETS.TEST", repr(list(test))]
    return read_config(FCOS, [*data, *opts])


def test_an_entry_becomes_a_name_with_its_classes(entry, caplog):
    cfg = read(entry)
    (name,) = cfg.DATASETS.TRAIN
    assert name.startswith("mine_")
    assert MetadataCatalog.get(name).thing_classes == ["dog", "cat"]
    (image,) = DatasetCatalog.get(name)
    assert image["annotations"][0]["category_id"] == 1
    assert MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert "Category ids" not in caplog.text


def test_the_heads_follow_the_data(entry):
    cfg = read(entry)
    heads = (cfg.MODEL.FCOS, cfg.MODEL.RETINANET, cfg.MODEL.ROI_HEADS, cfg.MODEL.GFL)
    assert [head.NUM_CLASSES for head in heads] == [2, 2, 2, 2]


def test_the_name_is_made_of_the_content(entry, tmp_path):
    (tmp_path / "other").mkdir()
    moved = write(tmp_path / "other" / "mine.json")
    assert read(entry).DATASETS.TRAIN == read(moved).DATASETS.TRAIN
    changed = write(tmp_path / "other" / "mine.json", category_id=3)
    assert read(entry).DATASETS.TRAIN != read(changed).DATASETS.TRAIN


def test_a_file_that_changed_after_it_got_its_name_is_told(entry, tmp_path, caplog):
    (name,) = read(entry).DATASETS.TRAIN
    DatasetCatalog.get(name)
    assert "have changed" not in caplog.text
    write(tmp_path / "mine.json", category_id=3)
    DatasetCatalog.get(name)
    assert f"The annotations of {name} " in caplog.text and "have changed" in caplog.text


def test_json_that_is_nested_without_end_is_told(entry):
    with open(entry["json"], "w") as f:
        f.write("[" * 200_000)
    with pytest.raises(UserError, match="mine.json is not valid JSON"):
        read(entry)


def test_one_file_does_not_describe_two_folders(entry, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="DATASETS.TEST: the same annotations as those of another"):
        read(entry, [{**entry, "images": str(tmp_path / "other")}])


def test_a_saved_config_makes_the_names_known_again(entry, tmp_path):
    cfg = read(entry)
    (name,) = cfg.DATASETS.TRAIN
    (tmp_path / "config.yaml").write_text(cfg.dump())
    DatasetCatalog.remove(name)
    again = read_config(str(tmp_path / "config.yaml"))
    assert list(again.DATASETS.TRAIN) == [name]
    assert name in DatasetCatalog
    DatasetCatalog.remove(name)
    register_described(cfg)  # as another process of the run does
    assert name in DatasetCatalog


def test_the_student_has_the_names_alone(entry):
    student = student_config(read(entry))
    assert "DESCRIBED" not in student.DATASETS
    assert student.DATASETS.TRAIN[0].startswith("mine_")


def test_an_entry_stands_in_a_yaml(entry, tmp_path):
    path = tmp_path / "mine.yaml"
    base = os.path.abspath(f"configs/{FCOS}")
    path.write_text(json.dumps({"_BASE_": base, "DATASETS": {"TRAIN": [entry]}}))
    assert read_config(str(path)).DATASETS.TRAIN[0].startswith("mine_")


def test_training_and_validation_have_the_same_classes(entry, tmp_path):
    val = write(tmp_path / "val.json", [{"id": 7, "name": "cat"}])
    with pytest.raises(UserError, match="val_.* has 1 classes, mine_.* has 2"):
        check_evaluation(read(entry, [val]))
    swapped = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    val = write(tmp_path / "val.json", swapped)
    with pytest.raises(UserError, match="val_.* has 'cat' as class 0, mine_.* has 'dog'"):
        check_evaluation(read(entry, [val]))


@pytest.mark.parametrize(
    "categories, words",
    [
        (None, "has no 'categories'"),
        ([], "names no class"),
        ([{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}], "two categories of the name 'cat'"),
        ([{"id": 1, "name": 5}], "names no class"),
        ([{"name": "cat"}], "has no 'categories' with 'id' and 'name'"),
    ],
)
def test_wrong_categories_are_told(tmp_path, categories, words):
    with pytest.raises(UserError, match=words):
        read(write(tmp_path / "wrong.json", categories))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"json": "/nowhere.json"}, "/nowhere.json does not exist"),
        ({"images": "/nowhere"}, "/nowhere is no folder"),
        ({"pictures": "x"}, "DATASETS.TRAIN has .*: give a name"),
        ({"images": 5}, "DATASETS.TRAIN has .*: give a name"),
    ],
)
def test_wrong_entries_are_told(entry, change, words):
    with pytest.raises(UserError, match=words):
        read({**entry, **change})


def test_broken_json_is_told(tmp_path, entry):
    (tmp_path / "mine.json").write_text('{"images": [')
    with pytest.raises(UserError, match="mine.json is not valid JSON"):
        read(entry)


def test_described_is_written_by_d2kd_alone(entry):
    with pytest.raises(UserError, match="DATASETS.DESCRIBED has"):
        read(entry, (), "DATASETS.DESCRIBED", "[{'name': 'x'}]")


@pytest.mark.parametrize("name", ["../1.jpg", "/1.jpg"])
def test_an_image_outside_of_the_folder_is_refused_by_whatever_reads_the_set(tmp_path, name):
    entry = write(tmp_path / "mine.json")
    content = json.loads((tmp_path / "mine.json").read_text())
    content["images"][0]["file_name"] = name
    (tmp_path / "mine.json").write_text(json.dumps(content))
    (dataset,) = read(entry).DATASETS.TRAIN
    with pytest.raises(UserError, match="mine.json: image .* is outside of the image folder"):
        DatasetCatalog.get(dataset)

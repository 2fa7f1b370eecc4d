"""Data sets that a config describes by a YAML of YOLO's layout."""

import pytest
import yaml
from detectron2.data import DatasetCatalog
from PIL import Image

from d2kd.check.evaluations import ap_of_annotations
from d2kd.config import read_config
from d2kd.data.check import check_evaluation, load_training_dicts
from d2kd.data.yolo import load_yolo, open_split
from d2kd.errors import UserError

FCOS = "shapes/baselines/fcos_tiny.yaml"


@pytest.fixture
def data(tmp_path):
    """Two splits of two images each; the second of each has no objects."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        Image.new("RGB", (40, 20)).save(tmp_path / "images" / split / "a.jpg")
        Image.new("RGB", (40, 20)).save(tmp_path / "images" / split / "b.png")
        (tmp_path / "labels" / split / "a.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    return write(tmp_path)


def write(folder, **changes):
    content = {"train": "images/train", "val": ["images/val"], "names": {0: "cat", 1: "dog"}}
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def read(path, *opts):
    sets = [repr([{"yolo": str(path), "split": split}]) for split in ("train", "val")]
    return read_config(FCOS, ["DATASETS.TRAIN", sets[0], "DATASETS.TEST", sets[1], *opts])


def test_boxes_classes_and_images_without_objects(data, tmp_path):
    cfg = read(data, "OUTPUT_DIR", str(tmp_path / "run"))
    (train,), (val,) = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    assert train.startswith("data_train_") and cfg.MODEL.FCOS.NUM_CLASSES == 2
    image, empty = DatasetCatalog.get(train)
    assert (image["width"], image["height"]) == (40, 20) and not empty["annotations"]
    (box,) = image["annotations"]
    assert box["bbox"] == [10, 5, 30, 15] and box["category_id"] == 1
    assert len(load_training_dicts(cfg)) == 1  # Detectron2 leaves out what has no objects
    check_evaluation(cfg)
    assert ap_of_annotations(cfg, val) == pytest.approx(100)


def test_the_name_follows_the_boxes(data, tmp_path):
    before, again = (read(data).DATASETS.TRAIN for _ in range(2))
    assert before == again
    (tmp_path / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    changed = read(data).DATASETS.TRAIN
    assert changed != before


def test_two_sets_are_trained_together(data, tmp_path):
    """Both number their images from 0."""
    sets = [{"yolo": str(data), "split": split} for split in ("train", "val")]
    cfg = read_config(FCOS, ["DATASETS.TRAIN", repr(sets), "DATASETS.TEST", repr(sets[:1])])
    assert len(load_training_dicts(cfg)) == 2


def test_boxes_that_changed_after_the_set_got_its_name_are_told(data, tmp_path, caplog):
    (name,) = read(data).DATASETS.TRAIN
    DatasetCatalog.get(name)
    assert "have changed" not in caplog.text
    (tmp_path / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    DatasetCatalog.get(name)
    assert f"The annotations of {name} " in caplog.text and "have changed" in caplog.text


def test_a_list_of_paths_and_a_root(data, tmp_path):
    (tmp_path / "list.txt").write_text("images/val/a.jpg\n")
    path = write(tmp_path, path=str(tmp_path), val="list.txt", names=["cat", "dog"])
    assert open_split(str(path), "val").images == (str(tmp_path / "images" / "val" / "a.jpg"),)


def test_folders_as_roboflow_names_them(data, tmp_path):
    """Relative to the parent of the folder in which they are."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / split).mkdir(exist_ok=True)
            (tmp_path / kind / split).rename(folder / split / kind)
    path = write(folder, train="../train/images", val=["../val/images"])
    image, _ = load_yolo(str(path), "train")
    assert image["file_name"] == str(folder / "train" / "images" / "a.jpg")
    assert len(image["annotations"]) == 1 and len(open_split(str(path), "val").images) == 2
    beside = folder.parent / "train" / "images"  # where it says, if it is there
    beside.mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(beside / "c.jpg")
    assert [x["file_name"][-5:] for x in load_yolo(str(path), "train")] == ["c.jpg"]


@pytest.mark.parametrize(
    "text",
    [
        "1 0.5 0.5 0.5 0.5\n\n",
        "\n1 0.5 0.5 0.5 0.5\n \n0 0.1 0.1 0.1 0.1",
        "\ufeff1 0.5 0.5 0.5 0.5\r\n",
        "\ufeff\n1 0.5 0.5 0.5 0.5",
    ],
)
def test_blank_lines_and_a_byte_order_mark(data, tmp_path, text):
    (tmp_path / "labels" / "train" / "a.txt").write_text(text, "utf-8")
    image, _ = load_yolo(str(data), "train")
    assert image["annotations"][0]["category_id"] == 1
    assert len(image["annotations"]) == text.count("0 0.1") + 1


def test_a_label_file_of_blank_lines_has_no_objects(data, tmp_path):
    (tmp_path / "labels" / "train" / "a.txt").write_text("\ufeff\n", "utf-8")
    assert not load_yolo(str(data), "train")[0]["annotations"]


def test_a_byte_order_mark_in_the_yaml_and_in_a_list_of_paths(data, tmp_path):
    (tmp_path / "list.txt").write_text("\ufeffimages/val/a.jpg\n", "utf-8")
    path = write(tmp_path, val="list.txt")
    path.write_text("\ufeff" + path.read_text(), "utf-8")
    assert [len(x["annotations"]) for x in load_yolo(str(path), "val")] == [1]


def test_numbers_of_classes_in_quotes(data, tmp_path):
    for names in ({"0": "cat", "1": "dog"}, {"1": "dog", "0": "cat"}, {0: "cat", "1": "dog"}):
        assert open_split(str(write(tmp_path, names=names)), "val").classes == ("cat", "dog")
    for names in ({"0": "cat", "2": "dog"}, {"²": "cat"}):
        with pytest.raises(UserError, match="'names' is {.*: give the classes in order, from 0"):
            open_split(str(write(tmp_path, names=names)), "val")


def test_an_image_that_lies_on_its_side(data, tmp_path):
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "images" / "train" / "a.jpg", exif=exif)
    image, _ = load_yolo(str(data), "train")
    assert (image["width"], image["height"]) == (20, 40)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train": None}, "has no 'train'"),
        ({"train": "nowhere"}, "nowhere, which does not exist"),
        ({"names": []}, "'names' is"),
        ({"names": {1: "cat"}}, "'names' is"),
        ({"names": ["cat", "cat"]}, "'names' has 'cat' twice: rename one"),
    ],
)
def test_what_is_wrong_with_the_yaml_is_told(data, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, **changes))


@pytest.mark.parametrize(
    "text, words",
    [
        ("2 0.5 0.5 0.5 0.5", "has the class '2', expected a number below 2"),
        ("cat 0.5 0.5 0.5 0.5", "has the class 'cat'"),
        ("² 0.5 0.5 0.5 0.5", "has the class '²'"),
        ("1 0.5 0.5", "a.txt cannot be read"),
        ("1 a b c d", "a.txt cannot be read"),
        ("1 0.5 0.5 -0.2 0.5", "a.txt cannot be read"),
    ],
)
def test_what_is_wrong_with_boxes_is_told(data, tmp_path, text, words):
    (tmp_path / "labels" / "train" / "a.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        load_training_dicts(read(data))


def test_images_in_folders_of_the_folder(data, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind / "train" / "more").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "images" / "train" / "more" / "c.jpg")
    (tmp_path / "labels" / "train" / "more" / "c.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    assert [len(x["annotations"]) for x in load_yolo(str(data), "train")] == [1, 0, 1]


def test_a_folder_without_images(data, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty, which holds no image"):
        open_split(str(write(tmp_path, train="empty")), "train")

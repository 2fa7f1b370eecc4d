"""Data sets that a config describes by a folder laid out as Pascal VOC's."""

import argparse
import shutil

import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import load_voc_instances
from PIL import Image

from d2kd.check.evaluations import ap_of_annotations
from d2kd.cli.arguments import add_data, add_overrides, overrides_of
from d2kd.config import read_config
from d2kd.data.check import check_evaluation, load_training_dicts
from d2kd.data.voc import load_voc
from d2kd.errors import UserError

FCOS = "shapes/baselines/fcos_tiny.yaml"
XML = """<annotation><size><width>40</width><height>30</height></size>
<object><name>{name}</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>25</ymax>
</bndbox></object></annotation>"""


@pytest.fixture
def folder(tmp_path):
    """Three images of three classes: two to train with, one to evaluate."""
    root = tmp_path / "mine"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for i, name in enumerate(("dog", "cat", "ant")):
        (root / "Annotations" / f"{i}.xml").write_text(XML.format(name=name))
        Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{i}.jpg")
    (root / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("1\n2\n")
    return root


def read(folder, *opts):
    sets = [[{"voc": str(folder), "split": split}] for split in ("train", "val")]
    data = ["DATASETS.TRAIN", repr(sets[0]), "DATASETS.TEST", repr(sets[1])]
    return read_config(FCOS, [*data, *opts])


def test_both_splits_have_the_classes_of_all(folder, tmp_path):
    cfg = read(folder, "OUTPUT_DIR", str(tmp_path / "run"))
    (train,), (val,) = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    assert train.startswith("mine_train_") and val.startswith("mine_val_")
    assert cfg.MODEL.FCOS.NUM_CLASSES == 3
    dicts = load_training_dicts(cfg)
    assert [d["annotations"][0]["category_id"] for d in dicts] == [2, 1]
    assert dicts[0]["annotations"][0]["bbox"] == [1, 2, 20, 25]  # counted from 0
    check_evaluation(cfg)
    assert ap_of_annotations(cfg, val) == pytest.approx(100)


def test_names_in_broken_lines_and_annotations_in_folders(folder):
    (folder / "Annotations" / "0.xml").write_text(XML.format(name="\n  cat\n"))
    for place in ("Annotations", "JPEGImages"):
        (folder / place / "more").mkdir()
    (folder / "Annotations" / "more" / "3.xml").write_text(XML.format(name="emu"))
    Image.new("RGB", (40, 30)).save(folder / "JPEGImages" / "more" / "3.jpg")
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\nmore/3\n")
    cfg = read(folder)
    assert cfg.DATASETS.DESCRIBED[0]["classes"] == ["ant", "cat", "emu"]
    dicts = load_training_dicts(cfg)
    assert [d["annotations"][0]["category_id"] for d in dicts] == [1, 2]


def test_equal_annotations_of_other_images_are_told(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other" / "mine")
    sets = [{"voc": str(x), "split": "train"} for x in (folder, tmp_path / "other" / "mine")]
    with pytest.raises(UserError, match=r"the same annotations .* \(.*other/mine\)"):
        read_config(FCOS, ["DATASETS.TRAIN", repr(sets)])


def test_a_saved_config_and_a_changed_file(folder, tmp_path):
    cfg = read(folder)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    DatasetCatalog.remove(cfg.DATASETS.TRAIN[0])
    again = read_config(str(tmp_path / "config.yaml"))
    assert list(again.DATASETS.TRAIN) == list(cfg.DATASETS.TRAIN)
    assert len(DatasetCatalog.get(again.DATASETS.TRAIN[0])) == 2
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n2\n")
    assert list(read(folder).DATASETS.TRAIN) != list(cfg.DATASETS.TRAIN)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("ImageSets/Main/val.txt", None, "val.txt does not exist: give a folder laid out"),
        ("Annotations/1.xml", "<annotation>", "1.xml is not valid XML"),
        ("Annotations/1.xml", XML.format(name=""), "1.xml has an object without a name"),
        ("Annotations/1.xml", "<annotation/>", "1.xml: size/width is None, expected pixels"),
        (
            "Annotations/1.xml",
            XML.format(name="cat").replace("<xmin>", "<xmin>x"),
            "1.xml: bndbox/xmin of 'cat' is 'x.*', expected pixels",
        ),
    ],
)
def test_faults_are_told(folder, name, content, words):
    path = folder / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        read(folder)


def test_ordinary_folders_are_read_as_detectron2_reads_them(folder):
    (folder / "Annotations" / "1.xml").write_text(
        "<?xml version='1.0' encoding='utf-8'?>"
        + XML.format(name="cat").replace("</annotation>", "")
        + "<object><name>dog</name><difficult>1</difficult><bndbox><ymax>9.5</ymax><xmin>1</xmin>"
        "<ymin>1</ymin><xmax>40</xmax></bndbox><part><name>head</name></part></object></annotation>"
    )
    expected = load_voc_instances(str(folder), "train", ["ant", "cat", "dog"])
    assert [len(d["annotations"]) for d in expected] == [1, 2]
    assert load_voc(str(folder), "train", ["ant", "cat", "dog"]) == expected


def rename(folder, name, ending):
    """Gives the first image another name."""
    (folder / "Annotations" / "0.xml").rename(folder / "Annotations" / f"{name}.xml")
    (folder / "JPEGImages" / "0.jpg").unlink()
    Image.new("RGB", (40, 30)).save(folder / "JPEGImages" / f"{name}{ending}")


@pytest.mark.parametrize(
    "name, ending, before, after",
    [
        ("0", ".jpg", "", ""),
        ("0", ".jpg", "\ufeff", "\n\n"),
        ("0", ".jpg", "\n", " \r\n"),
        ("a b", ".jpg", "", "\n"),
        ("a#b", ".jpg", "", "\n"),
        ("#1 100%", ".jpg", "", "\n"),
        ("café", ".jpg", "", "\n"),
        ("0", ".png", "", "\n"),
        ("0", ".JPG", "", "\n"),
    ],
)
def test_names_and_endings_of_images(folder, name, ending, before, after):
    rename(folder, name, ending)
    (folder / "ImageSets" / "Main" / "train.txt").write_text(f"{before}{name}{after}", "utf-8")
    [d] = load_training_dicts(read(folder))
    assert d["file_name"] == str(folder / "JPEGImages" / f"{name}{ending}")
    assert d["image_id"] == name and len(d["annotations"]) == 1


def test_an_image_that_is_not_there_is_told(folder):
    (folder / "JPEGImages" / "0.jpg").unlink()
    words = "JPEGImages/0.jpg: image 0: does not exist: .*VOC's layout"
    with pytest.raises(UserError, match=words):
        load_training_dicts(read(folder))


@pytest.mark.parametrize(
    "line, words",
    [
        ("7", "train.txt names '7', but .*/7.xml does not exist"),
        ("0.jpg", "train.txt names '0.jpg', but .*: give one name per line, without"),
        ("1 -1", "train.txt names '1 -1', but .*: give one name per line"),
        ("../Annotations/1", "train.txt: image '.*' is outside of the image folder"),
    ],
)
def test_a_split_that_names_what_is_not_there(folder, line, words):
    (folder / "ImageSets" / "Main" / "train.txt").write_text(f"0\n{line}\n")
    with pytest.raises(UserError, match=f"DATASETS.TRAIN: .*{words}") as error:
        load_training_dicts(read(folder))
    assert "\n" not in str(error.value)


def test_annotations_that_changed_since_the_run_began(folder):
    cfg = read(folder)
    path = folder / "Annotations" / "0.xml"
    path.write_text(XML.format(name="cow"))
    with pytest.raises(UserError, match="0.xml has the class 'cow', expected one of ant, cat, dog"):
        load_training_dicts(cfg)
    path.write_text("<annotation>")
    with pytest.raises(UserError, match="0.xml is not valid XML"):
        load_training_dicts(cfg)


def test_sizes_with_a_decimal_point(folder):
    path = folder / "Annotations" / "0.xml"
    path.write_text(XML.format(name="cat").replace(">40<", ">40.0<"))
    assert load_training_dicts(read(folder))[0]["width"] == 40
    path.write_text(XML.format(name="cat").replace(">40<", ">40.5<"))
    with pytest.raises(UserError, match="0.xml: size/width is '40.5', expected pixels"):
        load_voc(str(folder), "train", ["ant", "cat", "dog"])


def test_the_flags(folder):

    parser = argparse.ArgumentParser()
    add_data(parser)
    add_overrides(parser)
    parser.set_defaults(config_file="")
    words = ["--train-voc", str(folder), "train"]
    opts = overrides_of(parser.parse_intermixed_args(words))
    assert opts == ["DATASETS.TRAIN", repr([{"voc": str(folder), "split": "train"}])]
    words += ["--train-json", "a.json", "--train-images", "b"]
    with pytest.raises(UserError, match="--train-json and --train-voc are several data sets"):
        overrides_of(parser.parse_intermixed_args(words))

"""Every fault of a data set is found before training, with its file and what is faulty there."""

import logging
import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from faults import DUBIOUS, IN_IMAGES, IN_JSON, NUMBER, SIZE, write_set
from PIL import Image

from d2kd.check.evaluations import ap_of_annotations
from d2kd.config import default_config
from d2kd.data.annotations import check_annotations
from d2kd.data.check import check_annotation_files, check_evaluation, load_training_dicts
from d2kd.data.findings import ERROR, WARNING, summary
from d2kd.data.images import check_image, check_images
from d2kd.data.sets import inspect_dataset
from d2kd.errors import UserError

# Only evaluation needs these
OF_EVALUATION = {
    "area missing",
    "iscrowd missing",
    "annotation id of another kind",
    "annotation id NaN",
    "annotation id with a decimal point",
    "annotation id 0",
}


@pytest.fixture
def sets(tmp_path):
    """Writes and registers a faulty set and a good one; the config of a run on them."""

    def write(faulty, **fault):
        cfg = default_config()
        for key in ("TRAIN", "TEST"):
            folder = tmp_path / key
            path = write_set(folder, **(fault if key == faulty else {}))
            register_coco_instances(f"faults_{key}", {}, path, str(folder))
            cfg.DATASETS[key] = (f"faults_{key}",)
        return cfg

    yield write
    for key in ("TRAIN", "TEST"):
        DatasetCatalog.pop(f"faults_{key}", None)
        MetadataCatalog.pop(f"faults_{key}", None)


def start(cfg):
    """What training does with data before anything else."""
    check_annotation_files(cfg)
    check_evaluation(cfg)
    load_training_dicts(cfg)


def found(name, evaluated):
    content = inspect_dataset(name, evaluated, masks="")
    return [*content.findings, *check_images(content.images)]


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
@pytest.mark.parametrize("fault", IN_JSON)
def test_faults_of_annotations(sets, caplog, fault, key):
    change, words = IN_JSON[fault]
    cfg = sets(key, change=change)
    if key == "TRAIN" and fault in OF_EVALUATION:
        start(cfg)
        return
    with caplog.at_level(logging.WARNING, logger="d2kd"):
        if fault in DUBIOUS and not (key == "TRAIN" and "annotations" in fault):
            start(cfg)
            said = "\n".join(record.message for record in caplog.records)
        else:
            with pytest.raises(UserError) as error:
                start(cfg)
            said = str(error.value)
            assert "\n" not in said
    if fault not in ("no annotations", "annotations empty") or key == "TEST":
        assert re.search(f"DATASETS.{key}: .*set.json: .*{words}", said)
    severity = WARNING if fault in DUBIOUS else ERROR
    shown = [f for f in found(f"faults_{key}", key == "TEST") if f.severity == severity]
    assert any(re.search(words, str(f)) and f.file.endswith("set.json") for f in shown)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
@pytest.mark.parametrize("fault", IN_IMAGES)
def test_faults_of_images(sets, fault, key):
    damage, words = IN_IMAGES[fault]
    cfg = sets(key, damage=damage)
    with pytest.raises(UserError, match=f"DATASETS.{key}: .*2.png: image 2: .*{words}"):
        start(cfg)
    [finding] = found(f"faults_{key}", key == "TEST")
    assert finding.severity == ERROR and finding.image == 2 and words in finding.message
    assert finding.file.endswith("2.png")


def test_images_are_looked_at_although_the_annotations_cannot_be_loaded(sets):
    cfg = sets("TEST", change=IN_JSON["box empty"][0], damage=IN_IMAGES["no image"][0])
    kinds = {finding.kind for finding in found(cfg.DATASETS.TEST[0], True)}
    assert kinds == {"box that is not four numbers", "file that is no image"}


def test_a_good_set_has_no_findings(sets, caplog):
    cfg = sets(None)
    with caplog.at_level(logging.WARNING, logger="d2kd"):
        start(cfg)
    assert not caplog.records
    assert found("faults_TRAIN", False) == found("faults_TEST", True) == []
    content = inspect_dataset("faults_TEST", True, masks="")
    assert str(content) == f"{NUMBER} images, {2 * NUMBER} boxes, 2 classes"


@pytest.mark.parametrize("training", [True, False])
def test_masks_are_asked_for_where_they_are_trained_or_evaluated(sets, training):
    cfg = sets(None)
    cfg.MODEL.MASK_ON = True
    with pytest.raises(UserError, match="annotation 10 of image 1: has no 'segmentation'"):
        check_annotation_files(cfg, training)


def test_masks_in_run_lengths_are_learned_as_bitmasks_alone():
    mask = {"size": [4, 4], "counts": [0, 16]}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "segmentation": mask}
    images = [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 4}]
    for annotation, masks, kinds in (
        (box, "polygon", ["mask in run lengths"]),
        (box, "bitmask", []),
        (box, "", []),
        ({**box, "iscrowd": 1}, "polygon", []),
    ):
        data = {
            "images": images,
            "annotations": [annotation],
            "categories": [{"id": 1, "name": "a"}],
        }
        assert [x.kind for x in check_annotations(data, "a.json", masks=masks)] == kinds


@pytest.mark.parametrize(
    "mask, training, evaluation",
    [
        ([[1, 1, 9, 1, 9, 9]], "", ""),
        ([[1, 1, 9, 1, 9, 9], [1, 1]], "", ""),  # Detectron2 leaves the second one out
        ([[1, 1], [1, 1, 9, 1, 9, 9]], "", "mask that is none"),
        ([[], [1, 1, 9, 1, 9, 9]], "", "mask that is none"),
        ([[1, 1, 9, None, 9, 9]], "mask that is none", "mask that is none"),
        ([["1", "1", "9", "1", "9", "9"]], "mask that is none", "mask that is none"),
        ([1, 1, 9, 1, 9, 9], "mask that is none", "mask that is none"),
        ([[1, 1, 9, 9]], "mask without area", "mask that is none"),
        ([[]], "mask without area", "mask that is none"),
    ],
)
def test_polygons(mask, training, evaluation):
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8], "segmentation": mask}
    data = {
        "info": {},
        "images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 20}],
        "annotations": [{**box, "area": 32, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "a"}],
    }
    for evaluated, kind in ((False, training), (True, evaluation)):
        found = check_annotations(data, "a.json", evaluated, "polygon")
        assert [x.kind for x in found] == ([kind] if kind else [])
    assert not check_annotations(data, "a.json", masks="")


WHOLE = {
    "images": ("id", "width", "height"),
    "categories": ("id",),
    "annotations": ("image_id", "category_id", "iscrowd"),
}


def as_floats(data):
    """As pandas writes whole numbers of a table in which some are missing."""
    for key, names in WHOLE.items():
        for entry in data[key]:
            entry.update({name: float(entry[name]) for name in names})


def test_whole_numbers_with_a_decimal_point_are_trained_and_evaluated(sets, tmp_path, caplog):
    cfg = sets("TEST", change=as_floats)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    with caplog.at_level(logging.WARNING, logger="d2kd"):
        start(cfg)
    assert not caplog.records and found("faults_TEST", True) == []
    assert ap_of_annotations(cfg, "faults_TEST") == pytest.approx(100)


def test_where_masks_are_evaluated_sizes_of_images_are_integers(sets):
    def change(data):
        as_floats(data)
        for a in data["annotations"]:
            a["segmentation"] = [[2, 3, 12, 3, 12, 15]]

    cfg = sets("TEST", change=change)
    cfg.MODEL.MASK_ON = True
    with pytest.raises(
        UserError, match=r"image 1.0: .*\[40.0, 30.0\], which the evaluation of masks"
    ):
        check_annotation_files(cfg, training=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = cfg.DATASETS.TEST, ()
    check_annotation_files(cfg)


def test_bad_images_that_may_be_skipped_do_not_stop_training(sets):
    cfg = sets("TRAIN", damage=IN_IMAGES["image missing"][0])
    cfg.RUN.SKIP_BAD_IMAGES = 1
    assert len(load_training_dicts(cfg)) == NUMBER


def test_the_worst_comes_first_with_few_examples(sets):
    def many(data):
        for a in data["annotations"][:5]:
            a["bbox"] = [9, 5, 0, 9]
        del data["annotations"][7]["area"]

    sets("TEST", change=many)
    lines = summary(found("faults_TEST", True), examples=2)
    assert lines[0].startswith("error: annotation without area: ")
    assert lines[1] == "warning: box without area (5)" and lines[-1] == "  and 3 more"
    assert len(lines) == 5


def test_an_upright_orientation_is_only_mentioned(sets):
    def upside_down(folder):
        exif = Image.Exif()
        exif[0x0112] = 3
        Image.new("RGB", SIZE).save(folder / "2.png", exif=exif)

    sets("TEST", damage=upside_down)
    [finding] = found("faults_TEST", True)
    assert finding.severity == WARNING and "orientation 3" in finding.message


@pytest.mark.parametrize("processes", [0, 2])
def test_processes_find_the_same(tmp_path, processes):
    write_set(tmp_path, damage=IN_IMAGES["image truncated"][0])
    dicts = [
        {"file_name": str(tmp_path / f"{i + 1}.png"), "width": 40, "height": 30, "image_id": i}
        for i in range(NUMBER)
    ]
    assert [f.image for f in check_images(dicts, processes)] == [1]


def test_a_name_that_is_empty_is_that_of_no_image():
    assert check_image({"file_name": "", "image_id": 3})[::4] == ("image missing", 3)
    assert check_image({"image_id": 3}) is None


def test_a_set_without_a_file_is_looked_into_as_well():
    corner = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    broken = {**corner, "bbox": [1, 2, 3]}
    d = {"file_name": "a", "width": 10, "height": 10, "image_id": 5}
    d["annotations"] = [corner, broken, {**corner, "bbox": [8.0, 8, 12, 9]}]
    DatasetCatalog.register("faults_dicts", lambda: [d])
    MetadataCatalog.get("faults_dicts").set(thing_classes=["cat"])
    try:
        findings = inspect_dataset("faults_dicts", False, masks="").findings
    finally:
        DatasetCatalog.remove("faults_dicts")
        MetadataCatalog.remove("faults_dicts")
    assert [f.kind for f in findings] == [
        "box that is not four numbers",
        "box that leaves its image",
    ]

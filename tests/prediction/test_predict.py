"""Detections of image files: the pictures and the JSON that d2kd predict leaves."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from made_up_run import made_up_run

from d2kd.cli.main import main
from d2kd.errors import UserError
from d2kd.prediction import SAMPLE_PHOTOGRAPH, image_files, images_at_hand
from d2kd.prediction.folder import _draw


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up_run(tmp_path_factory.mktemp("prediction") / "run", "FCOS")


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    image = cv2.imread(SAMPLE_PHOTOGRAPH)
    cv2.imwrite(str(folder / "one.jpg"), image[:100, :150])
    cv2.imwrite(str(folder / "more" / "one.png"), image[:90, :60])
    (folder / "two.jpg").write_bytes(b"no image")
    return folder


def test_pictures_and_json(run, photographs, tmp_path, capsys):
    output = tmp_path / "found"
    words = ["predict", run.folder, str(photographs), str(photographs / "more" / "*.png")]
    main([*words, "--output", str(output), "--threshold", "0.05", "--device", "cpu"])
    assert "in 2 images, 1 files skipped" in capsys.readouterr().out
    content = json.loads((output / "predictions.json").read_text())
    assert content["skipped"] == [str(photographs / "two.jpg")]
    pictures = [entry["picture"] for entry in content["images"]]
    assert pictures == ["one.jpg", "one_2.jpg"]
    assert sorted(p.name for p in output.iterdir()) == [*pictures, "predictions.json"]
    picture = cv2.imread(str(output / "one_2.jpg"))
    assert max(picture.shape[:2]) == 640  # small images are drawn larger

    entry = content["images"][1]
    assert (entry["height"], entry["width"]) == (90, 60)
    found = DefaultPredictor(run.student_config(["MODEL.DEVICE", "cpu"]))(
        cv2.imread(str(photographs / "more" / "one.png"))
    )["instances"]
    found = found[found.scores >= 0.05]
    assert len(found) == len(entry["detections"]) > 0
    boxes = found.pred_boxes.tensor.numpy()
    boxes[:, 2:] -= boxes[:, :2]
    assert np.allclose([x["bbox"] for x in entry["detections"]], boxes, atol=1e-3)
    names = [run.classes[i] for i in found.pred_classes]
    assert [x["class"] for x in entry["detections"]] == names
    assert [x["class_index"] for x in entry["detections"]] == found.pred_classes.tolist()


def test_a_strip_is_skipped_and_dollars_are_no_formula(run, photographs, tmp_path, capsys):
    cv2.imwrite(str(photographs / "strip.png"), np.zeros((1, 4000, 3), np.uint8))
    output = str(tmp_path / "found")
    main(["predict", run.folder, str(photographs), "--output", output, "--device", "cpu"])
    said = capsys.readouterr()
    assert "in 1 images, 2 files skipped" in said.out
    image = np.zeros((40, 40, 3), np.uint8)
    boxes = Boxes(torch.tensor([[3.0, 3.0, 30.0, 30.0]]))
    found = Instances(
        (40, 40), pred_boxes=boxes, scores=torch.ones(1), pred_classes=torch.zeros(1).int()
    )
    assert _draw(image, found, ["a$b_{$c"]).any()


def test_an_image_of_16_bits_is_skipped(run, photographs, tmp_path, capsys, caplog):
    cv2.imwrite(str(photographs / "deep.png"), np.full((40, 40), 700, np.uint16))
    output = str(tmp_path / "found")
    main(["predict", run.folder, str(photographs), "--output", output, "--device", "cpu"])
    assert "in 1 images, 2 files skipped" in capsys.readouterr().out
    assert "write it with 8 bits" in caplog.text


def test_nothing_is_written_of_files_that_are_no_images(run, photographs, tmp_path, capsys):
    words = ["predict", run.folder, str(photographs / "two.jpg"), "--device", "cpu"]
    with pytest.raises(SystemExit):
        main([*words, "--output", str(tmp_path / "found")])
    assert "none of the files is an image" in capsys.readouterr().err
    assert not list((tmp_path / "found").iterdir())


def test_a_folder_with_files_is_left_alone(run, photographs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["predict", run.folder, str(photographs / "one.jpg"), "--output", str(photographs)])
    assert "already: remove it, or give another --output" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["nowhere.jpg", "*.none"])
def test_a_word_that_names_nothing(word, tmp_path):
    with pytest.raises(UserError, match="names no file and no folder"):
        image_files([str(tmp_path / word)])
    with pytest.raises(UserError, match="holds no image"):
        image_files([str(tmp_path)])


def test_images_at_hand_are_of_the_validation_set_or_a_photograph(run, toy_dataset):
    assert images_at_hand(run.config(["DATASETS.TEST", ("unknown",)]), 3) == [SAMPLE_PHOTOGRAPH]
    DatasetCatalog.get(toy_dataset[1])  # draws it
    images = images_at_hand(run.config(["DATASETS.TEST", (toy_dataset[1],)]), 3)
    assert len(images) == 3 and all("val" in path for path in images)
    name = "images_without_a_folder"  # as those of YOLO's layout
    paths = [*images, "gone.jpg"]
    DatasetCatalog.register(name, lambda: [{"file_name": path} for path in paths])
    assert images_at_hand(run.config(["DATASETS.TEST", (name,)]), 2) == images[::2]
    DatasetCatalog.remove(name)

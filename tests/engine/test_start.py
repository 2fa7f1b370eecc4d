"""What cannot work is said before training starts, in one line."""

import json
import os

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from runs import run_config

from d2kd.cli.main import train as main
from d2kd.engine.preflight import refuse_unwritable
from d2kd.errors import UserError


@pytest.fixture
def command(tmp_path, capsys, toy_dataset):
    """Calls train_net.py on a small run; returns what it printed if it failed."""
    cfg = run_config(tmp_path, "FCOS", toy_dataset, ["TEST.EVAL_PERIOD", 0])
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())

    def call(*opts, flags=()):
        with pytest.raises(SystemExit) as stop:
            main(["--config-file", str(path), *flags, *map(str, opts)])
        assert stop.value.code == 1
        [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert not list(tmp_path.glob("run/model_*.pth"))
        return line

    return call


@pytest.fixture
def registered(tmp_path):
    """Registers a set of one image under a name, from what a JSON holds."""
    names = []

    def register(name, content):
        path = tmp_path / f"{name}.json"
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        register_coco_instances(name, {}, str(path), str(tmp_path))
        names.append(name)
        return f"('{name}',)"

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD is 0: give the steps"),
        (["SOLVER.MAX_ITER", 0], "SOLVER.MAX_ITER is 0"),
        (["SOLVER.AMP.ENABLED", True], "SOLVER.AMP.ENABLED is True, but MODEL.DEVICE is 'cpu'"),
        (["RUN.TIMEOUT", 0], "RUN.TIMEOUT is 0: give 1 or more"),
        (["RUN.SKIP_BAD_IMAGES", -1], "RUN.SKIP_BAD_IMAGES is -1: give 0 or more"),
    ],
)
def test_settings_that_cannot_work(command, opts, words):
    assert words in command(*opts)


def test_a_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("")
    message = command("OUTPUT_DIR", tmp_path / "file" / "run")
    assert "OUTPUT_DIR is" in message and "cannot be made: Not a directory; give" in message
    message = command("OUTPUT_DIR", tmp_path / "file")
    assert "file cannot be made: File exists; give another folder" in message
    if os.path.isdir("/proc/self"):  # nobody can write there
        with pytest.raises(UserError, match="OUTPUT_DIR is '/proc/self/fdinfo'"):
            refuse_unwritable("/proc/self/fdinfo")


def test_evaluations_that_cannot_start(command, registered):
    image = {"id": 1, "file_name": "none.png", "width": 9, "height": 9}
    names = MetadataCatalog.get("toy_train").thing_classes
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    content = {"images": [image], "annotations": [], "categories": categories}
    for name, json_of_set, words in (
        ("start_missing", None, "start_missing.json does not exist"),
        ("start_torn", json.dumps(content)[:-9], "start_torn.json: is not valid JSON"),
        ("start_image", content, "none.png: image 1: does not exist"),
        ("start_empty", {**content, "images": []}, "start_empty holds no image"),
    ):
        assert words in command("DATASETS.TEST", registered(name, json_of_set))
    assert "no data set 'start_imagination'" in command("DATASETS.TEST", "('start_imagination',)")


def test_keypoints_without_names(command):
    assert "'toy_train' of DATASETS.TRAIN names no keypoints" in command("MODEL.KEYPOINT_ON", True)


def test_an_unknown_evaluator(command):
    """Of a set of semantic labels, in which there is nothing of what detectors need."""
    name = "start_labels"
    DatasetCatalog.register(name, lambda: [{"file_name": "a.png", "sem_seg_file_name": "b.png"}])
    MetadataCatalog.get(name).set(evaluator_type="sem_seg", stuff_classes=["sky"])
    assert "whose evaluator_type is 'sem_seg'" in command("DATASETS.TEST", f"('{name}',)")
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    "names, said",
    [("()", "DATASETS.TEST is empty"), ("('start_vall',)", "no data set 'start_vall'")],
)
def test_evaluating_on_nothing_or_on_what_is_not_known(command, tmp_path, names, said):
    (tmp_path / "x.pth").touch()
    opts = [
        "MODEL.WEIGHTS",
        str(tmp_path / "x.pth"),
        "DATASETS.TEST",
        names,
        "DATASETS.TRAIN",
        "()",
    ]
    assert said in command(*opts, flags=["--eval-only"])


@pytest.mark.parametrize(
    "opts, said",
    [
        (["TEST.AUG.ENABLED", True], "TEST.AUG.ENABLED is True"),
        (["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5], "has 17 numbers"),
        (["OUTPUT_DIR", "s3://bucket/run"], "OUTPUT_DIR is 's3://bucket/run'"),
    ],
)
def test_what_training_would_not_heed(command, opts, said):
    assert said in command(*opts)


def test_evaluation_without_weights(command):
    assert "MODEL.WEIGHTS is empty, there is nothing to evaluate" in command(flags=["--eval-only"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(command, tmp_path, value):
    path = tmp_path / "teacher.pth"
    weights = torch.load(path, weights_only=True)
    weights["model"]["head.cls_score.bias"][0] = value
    torch.save(weights, path)
    message = command()
    assert f"DISTILL.TEACHER.WEIGHTS is '{path}'" in message
    assert "head.cls_score.bias is not finite" in message
    opts = ["MODEL.WEIGHTS", path, "DISTILL.METHODS", "[]", "MODEL.BASIC_RESNET.WIDTH", 16]
    assert "MODEL.WEIGHTS is" in command(*opts) and "is not finite" in command(*opts)
    assert "is not finite" in command(*opts, flags=["--eval-only"])

import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from small_shapes import SMALL

from d2kd.data.builtin import register_all, register_shapes


@pytest.fixture
def registered(tmp_path):
    """A fresh data set name, known only during the test."""
    spec = replace(SMALL, name="small_registered")
    register_shapes(spec, str(tmp_path))
    yield spec
    for split in ("train", "val"):
        DatasetCatalog.remove(f"{spec.name}_{split}")
        MetadataCatalog.remove(f"{spec.name}_{split}")


def test_importing_registers_all_names_and_draws_nothing(tmp_path):
    code = (
        "import d2kd.data, detectron2.data as d\n"
        "for n in ('shapes_tiny_train', 'shapes_tiny_val', 'shapes_train', 'shapes_val'):\n"
        "    m = d.MetadataCatalog.get(n)\n"
        "    assert n in d.DatasetCatalog and m.evaluator_type == 'coco'\n"
        "    print(m.json_file, m.image_root)\n"
    )
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    ).stdout.split()
    folder = tmp_path / "shapes_tiny"
    assert out[:2] == [
        str(folder / "annotations" / "instances_train.json"),
        str(folder / "train"),
    ]
    assert os.listdir(tmp_path) == []


def test_registering_twice_changes_nothing(registered, tmp_path):
    before = DatasetCatalog.list()
    register_shapes(registered, str(tmp_path))
    register_all(str(tmp_path))
    assert DatasetCatalog.list() == before


def test_the_set_is_drawn_when_first_asked_for(registered, tmp_path, caplog):
    name = f"{registered.name}_val"
    assert not (tmp_path / registered.name).exists()
    with caplog.at_level(logging.INFO, logger="d2kd"):
        dicts = DatasetCatalog.get(name)
        DatasetCatalog.get(name)
    assert [r.message for r in caplog.records if "Drawing" in r.message] == [
        f"Drawing {registered.name} (30 images, seed 0) into {tmp_path / registered.name}"
    ]
    assert len(dicts) == 6 and all(os.path.isfile(d["file_name"]) for d in dicts)
    labels = {a["category_id"] for d in dicts for a in d["annotations"]}
    assert labels <= set(range(6))
    assert MetadataCatalog.get(name).thing_classes == list(registered.classes)


def test_a_perfect_prediction_scores_100_in_coco_evaluation(registered, tmp_path):
    import torch
    from detectron2.structures import Boxes, BoxMode, Instances

    name = f"{registered.name}_val"
    dicts = DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, tasks=("bbox",), output_dir=str(tmp_path / "out"))
    evaluator.reset()
    for d in dicts:
        boxes = torch.tensor([a["bbox"] for a in d["annotations"]])
        instances = Instances((d["height"], d["width"]))
        instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        instances.scores = torch.ones(len(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in d["annotations"]])
        evaluator.process([d], [{"instances": instances}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_the_command_draws_and_reports_errors_in_one_line(tmp_path):
    tool = os.path.join(os.path.dirname(__file__), "..", "..", "tools", "make_shapes.py")
    (tmp_path / "mine").write_text("")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", tool, "shapes_tiny", "--output", str(tmp_path / "mine")],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.startswith("make_shapes: ") and len(run.stderr.splitlines()) == 1

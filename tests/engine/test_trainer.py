"""Whole runs: what is saved, resumed, evaluated and refused."""

import json
import subprocess
import sys

import pytest
import torch
from runs import run_config, train
from toys import AS_LOADED, STUDENTS

from d2kd.checkpoint import write_student_yaml
from d2kd.checkpoint.weights import checksum
from d2kd.distillation import build_model

# A queue, a parameter that does not decay, random regions
GDETKD = ["DISTILL.GDETKD.PROPOSALS_FROM", "teacher", "DISTILL.GDETKD.QUEUE_SIZE", 500]
RUNS = {name: (name, (), "FRS") for name in STUDENTS}
RUNS["GDetKD"] = ("FasterRCNN", GDETKD, "GDetKD")
# Starting another kind of loader draws a number, and this student samples its regions
RUNS["not grouped"] = ("FasterRCNN", ["DATALOADER.ASPECT_RATIO_GROUPING", False], "FRS")


@pytest.mark.parametrize("student, opts, method", RUNS.values(), ids=RUNS)
def test_killed_and_resumed_ends_with_the_same_weights(
    tmp_path, student, opts, method, toy_dataset
):
    whole = train(run_config(tmp_path / "a", student, toy_dataset, opts, methods=[method]))
    cfg = run_config(tmp_path / "b", student, toy_dataset, opts, methods=[method])
    killed = train(cfg, at=5)
    assert checksum(killed.student) != checksum(whole.student)
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 3
    assert checksum(resumed.student) == checksum(whole.student)
    assert checksum(resumed.bare_model.distillers) == checksum(whole.bare_model.distillers)


def test_kd_off_run_is_a_plain_run(tmp_path, toy_dataset):
    off = ["DISTILL.FRS.FEATURE.WEIGHT", 0.0, "DISTILL.FRS.CLS.WEIGHT", 0.0]
    runs = [
        train(run_config(tmp_path / str(i), "FasterRCNN", toy_dataset, opts, methods=methods))
        for i, (opts, methods) in enumerate([(off, ["FRS"]), ([], [])])
    ]
    assert checksum(runs[0].student) == checksum(runs[1].student)


def test_teacher_is_unchanged_and_absent_from_the_file(tmp_path, toy_dataset):
    cfg = run_config(tmp_path / "a", "FCOS", toy_dataset)
    trainer = train(cfg)
    teacher, rebuilt = trainer.bare_model.teacher, build_model(cfg).teacher
    cfg.merge_from_list(AS_LOADED)
    loaded = build_model(cfg).teacher
    assert teacher.checksum == rebuilt.checksum == checksum(loaded.detector)
    assert checksum(teacher.detector) == checksum(rebuilt.detector) != teacher.checksum
    saved = torch.load(tmp_path / "a" / "run" / "model_final.pth", weights_only=True)
    assert saved["model"].keys() == trainer.student.state_dict().keys()
    keys = {"model", "classes", "distillers", "trainer", "run_state", "iteration"}
    assert set(saved) == keys


def test_terms_and_weights_are_logged(tmp_path, toy_dataset):
    opts = ["SOLVER.MAX_ITER", 20, "DISTILL.FRS.FEATURE.WARMUP_ITERS", 40]
    cfg = run_config(tmp_path / "a", "FCOS", toy_dataset, opts)
    train(cfg)
    lines = (tmp_path / "a" / "run" / "metrics.json").read_text().splitlines()
    logged = {k: v for line in lines for k, v in json.loads(line).items()}
    assert logged["loss_frs_feature"] > 0 and logged["loss_frs_cls"] > 0
    assert logged["distill/frs_feature/weight"] == pytest.approx(
        cfg.DISTILL.FRS.FEATURE.WEIGHT * 19 / 40
    )
    assert {f"distill/frs_feature/level{i}" for i in range(5)} <= set(logged)


STOCK = """
import sys
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
import numpy as np
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
instances = DefaultPredictor(cfg)(np.zeros((64, 64, 3), np.uint8))["instances"]
assert "d2kd" not in sys.modules
print(instances.pred_boxes.tensor.shape[1])
"""


@pytest.mark.parametrize("student", ["RetinaNet", "FasterRCNN"])
def test_stock_detectron2_reads_student_yaml_and_weights(tmp_path, student, toy_dataset):
    # A backbone that stock Detectron2 has
    name = {"RetinaNet": "build_retinanet_resnet_fpn_backbone"}.get(
        student, "build_resnet_fpn_backbone"
    )
    stock = ["MODEL.BACKBONE.NAME", name, "MODEL.RESNETS.DEPTH", 18]
    stock += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    opts = [*stock, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", ()]
    cfg = run_config(tmp_path / "a", student, toy_dataset, opts, teacher_opts=stock)
    train(cfg)
    write_student_yaml(cfg)
    student_yaml = tmp_path / "a" / "run" / "student.yaml"
    assert "DISTILL" not in student_yaml.read_text()
    command = [sys.executable, "-W", "ignore", "-c", STOCK, str(student_yaml)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "4"
    assert "not found" not in result.stderr and "not in the model" not in result.stderr.lower()

"""Detectors side by side."""

import json

import pytest
import torch
from made_up_run import KINDS, made_up_run
from toys import SMALLER, detector

from d2kd.analysis import analyze, gap_closed
from d2kd.cli.main import main
from d2kd.engine.trained_run import open_run
from d2kd.errors import UserError


def write_metrics(run, *lines):
    with open(f"{run.folder}/metrics.json", "w") as f:
        f.write("\n".join(lines))


@pytest.fixture
def runs(tmp_path):
    """A distilled run with a teacher of twice the width, and a plain one."""
    width = [*SMALLER, "MODEL.BASIC_RESNET.WIDTH", 32]
    torch.save({"model": detector(KINDS["FCOS"], width).state_dict()}, tmp_path / "teacher.pth")
    distill = ["DISTILL.METHODS", ["FRS"], "DISTILL.TEACHER.CONFIG", KINDS["FCOS"]]
    distill += ["DISTILL.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")]
    distill += ["DISTILL.TEACHER.OPTS", width]
    distilled = made_up_run(tmp_path / "distilled", "FCOS", distill)
    plain = made_up_run(tmp_path / "plain", "FCOS")
    write_metrics(distilled, '{"bbox/AP": 10.0, "iteration": 5}', '{"bbox/AP": 36.0, "iter')
    write_metrics(plain, '{"bbox/AP": 29.0, "iteration": 5}', '{"bbox/AP": 30.0, "iteration": 9}')
    return distilled, plain


def test_teacher_plain_and_distilled_student_side_by_side(runs, tmp_path, capsys):
    distilled, plain = runs
    path = tmp_path / "analysis.json"
    words = ["analyze", distilled.folder, "--plain", plain.folder, "--repeats", "2"]
    main([*words, "--json", str(path), "--device", "cpu"])
    text = capsys.readouterr().out
    assert "teacher" in text and "student with FRS" in text and "2 passes" in text
    teacher, alone, student = json.loads(path.read_text())["rows"]
    assert [x["label"] for x in (teacher, alone, student)] == [
        "teacher",
        "plain student",
        "student with FRS",
    ]
    parameters = sum(p.numel() for p in distilled.student("cpu").parameters())
    assert student["size"]["parameters"] == alone["size"]["parameters"] == parameters
    assert teacher["size"]["parameters"] > parameters
    assert teacher["size"]["gflops"] > student["size"]["gflops"] > 0
    assert student["size"]["weights_bytes"] >= 4 * parameters
    assert 0 < student["latency"]["median"] <= student["latency"]["p99"]
    assert (teacher["ap"], alone["ap"], student["ap"]) == (None, 30.0, 10.0)  # torn line left out


def test_evaluation_finds_what_is_not_known(tmp_path, toy_dataset):
    data = ["DATASETS.TRAIN", (toy_dataset[0],), "DATASETS.TEST", (toy_dataset[1],)]
    run = made_up_run(tmp_path / "run", "FCOS", data)
    (row,) = analyze(run, evaluate=True, repeats=1, device="cpu").rows
    assert row.label == "student" and row.ap is not None and 0 <= row.ap < 20


@pytest.mark.parametrize("count, names", [(9, None), (6, list("abcdef"))])
def test_a_teacher_of_other_classes_is_not_evaluated(tmp_path, toy_dataset, count, names):
    classes = [*SMALLER, "MODEL.FCOS.NUM_CLASSES", count]
    state = detector(KINDS["FCOS"], classes).state_dict()
    torch.save({"model": state, "classes": names}, tmp_path / "teacher.pth")
    opts = ["DATASETS.TRAIN", (toy_dataset[0],), "DATASETS.TEST", (toy_dataset[1],)]
    opts += ["DISTILL.METHODS", ["PKD"], "DISTILL.TEACHER.CONFIG", KINDS["FCOS"]]
    opts += ["DISTILL.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")]
    run = made_up_run(tmp_path / "run", "FCOS", [*opts, "DISTILL.TEACHER.OPTS", classes])
    found = analyze(run, evaluate=True, repeats=1, device="cpu")
    teacher, student = found.rows
    assert teacher.ap is None and student.ap is not None
    assert "teacher was not evaluated: its classes are not those of the data" in found.table()


def test_ap_of_another_checkpoint_is_not_taken(runs, tmp_path):
    _, plain = runs
    folder = tmp_path / "plain"
    (folder / "model_final.pth").rename(folder / "model_0000004.pth")
    (row,) = analyze(open_run(plain.folder), repeats=1, device="cpu").rows
    assert row.ap is None


def test_ap_of_an_earlier_evaluation_is_not_taken(runs):
    """The run was killed in its last evaluation."""
    _, plain = runs
    write_metrics(plain, '{"bbox/AP": 29.0, "iteration": 5}', '{"total_loss": 1.0, "iteration": 9}')
    (row,) = analyze(plain, repeats=1, device="cpu").rows
    assert row.ap is None


def test_a_run_without_a_validation_set_is_not_evaluated(tmp_path):
    plain = made_up_run(tmp_path / "run", "FCOS", ["DATASETS.TEST", ()])
    with pytest.raises(UserError, match="--evaluate: DATASETS.TEST of the run is empty"):
        analyze(plain, evaluate=True, repeats=1, device="cpu")


def test_gap_closed():
    assert gap_closed(40.0, 30.0, 36.0) == pytest.approx(0.6)
    assert gap_closed(40.0, 30.0, 28.0) == pytest.approx(-0.2)
    for unknown in ((None, 30.0, 36.0), (40.0, None, 36.0), (40.0, 30.0, None), (30.0, 30.0, 31.0)):
        assert gap_closed(*unknown) is None

"""What two names amount to: a YAML that trains, or two of them."""

import contextlib
import json
import shutil
import sys

import pytest
import torch
import yaml
from detectron2 import model_zoo

from d2kd.check.estimate import in_words, seconds_of_training
from d2kd.cli.main import main
from d2kd.config import read_config
from d2kd.errors import UserError
from d2kd.pairing import finetune, make_plan
from d2kd.pairing.recipe import described_datasets, nested, write_recipe

STUDENT, TEACHER = "shapes/baselines/fcos_tiny", "shapes/baselines/fcos_tiny_teacher"


@pytest.fixture
def own_data(tmp_path):
    """Overrides for data of two classes without any image."""
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(("disc", "box"))]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    entry = repr([{"json": str(path), "images": str(tmp_path)}])
    return ["DATASETS.TRAIN", entry, "DATASETS.TEST", entry]


def test_the_recipe_is_the_run(tmp_path):
    opts = ["SOLVER.MAX_ITER", "7", "SOLVER.STEPS", "(3,)", "OUTPUT_DIR", str(tmp_path)]
    plan = make_plan(STUDENT, TEACHER, [], opts)
    assert "method   FRS: heads of one kind" in str(plan)
    assert "weights of FRS: feature 0.01, cls 0.05 (the authors', for FCOS)" in str(plan)
    path = plan.write()
    cfg = read_config(path)
    assert cfg.DISTILL.METHODS == ["FRS"] and str(tmp_path) == cfg.OUTPUT_DIR
    assert f"{TEACHER}.yaml" == cfg.DISTILL.TEACHER.CONFIG
    assert cfg.DISTILL.TEACHER.WEIGHTS == "d2kd://fcos_tiny_teacher.pth"
    words = ["DISTILL.METHODS", ["FRS"], "DISTILL.TEACHER.CONFIG", f"{TEACHER}.yaml"]
    words += ["DISTILL.TEACHER.WEIGHTS", "d2kd://fcos_tiny_teacher.pth", *opts]
    assert cfg == read_config(f"{STUDENT}.yaml", words)


def test_without_an_output_the_folder_is_named_after_all():
    assert make_plan(STUDENT, TEACHER).output == "output/fcos_tiny_fcos_tiny_teacher_FRS"


def test_a_run_of_detectron2_teaches(tmp_path):
    """Its own trainer leaves a config and checkpoints, and no word on the student."""
    zoo = "COCO-Detection/retinanet_R_50_FPN_1x"
    (tmp_path / "config.yaml").write_text(model_zoo.get_config(f"{zoo}.yaml").dump())
    with pytest.raises(UserError, match="is no run: give the folder with student.yaml"):
        make_plan(zoo, str(tmp_path))
    for name in ("model_0000999.pth", "model_final.pth"):
        torch.save({"model": {}}, tmp_path / name)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    named = {".": "model_final.pth", "model_0000999.pth": "model_0000999.pth"}
    for teacher, weights in named.items():
        plan = make_plan(zoo, str(tmp_path / teacher), [], ["OUTPUT_DIR", str(tmp_path / "out")])
        cfg = read_config(plan.write())
        assert cfg.DISTILL.METHODS == ["FRS"]
        files = (str(tmp_path / "config.yaml"), str(tmp_path / weights))
        assert files == (cfg.DISTILL.TEACHER.CONFIG, cfg.DISTILL.TEACHER.WEIGHTS)
        shutil.rmtree(tmp_path / "out")
    (tmp_path / "config.yaml").write_text("model: {_target_: detectron2.modeling.RetinaNet}")
    with pytest.raises(UserError, match="a LazyConfig left, .* give the .py that it was, with"):
        make_plan(zoo, str(tmp_path))


def test_a_teacher_without_weights_is_told_how_to_get_some(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing was trained here
    with pytest.raises(UserError, match="no weights are known for it; train it first"):
        make_plan("shapes/baselines/gfl_tiny", "shapes/baselines/gfl_tiny_teacher")


def test_a_check_of_the_config_alone_needs_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = [
        "--student",
        "shapes/baselines/gfl_tiny",
        "--teacher",
        "shapes/baselines/gfl_tiny_teacher",
    ]
    main(["check", *names, "--config-only", "MODEL.DEVICE", "cpu"])
    assert "found 0 errors" in capsys.readouterr().out


def test_other_classes_are_told(own_data):
    plan = make_plan(STUDENT, TEACHER, [], own_data)
    assert plan.choice.methods == ["PKD"] and plan.teacher is None
    assert "classes  the teacher does not know the student's" in str(plan)


def test_a_teacher_learns_the_classes_first(own_data, tmp_path):
    opts = [*own_data, "SOLVER.MAX_ITER", "9", "MODEL.DEVICE", "cpu"]
    opts += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "OUTPUT_DIR", str(tmp_path / "run")]
    plan = make_plan(STUDENT, TEACHER, [], opts, finetune=True)
    assert plan.choice.methods == ["FRS"]
    first, second = read_config(plan.write_teacher()), read_config(plan.write())
    assert first.MODEL.WEIGHTS == "d2kd://fcos_tiny_teacher.pth"
    assert first.MODEL.FCOS.NUM_CLASSES == 2 and first.DISTILL.METHODS == []
    for key in ("SOLVER", "DATASETS", "INPUT"):
        assert first[key] == second[key]
    # An absolute path, wherever the recipe is used from
    assert str(tmp_path / "run" / "teacher" / "recipe.yaml") == second.DISTILL.TEACHER.CONFIG
    assert f"{first.OUTPUT_DIR}/model_final.pth" == second.DISTILL.TEACHER.WEIGHTS
    assert 0 < seconds_of_training(second, 2) < 600


def test_a_teacher_that_was_named_by_its_weights_teaches_as_it_was_trained(own_data, tmp_path):
    weights = tmp_path / "mine.pth"
    torch.save({"model": {}}, weights)
    opts = [*own_data, "DISTILL.TEACHER.WEIGHTS", str(weights), "OUTPUT_DIR", str(tmp_path / "run")]
    plan = make_plan(STUDENT, TEACHER, [], [*opts, "DISTILL.TEACHER.FOLD_NORMS", "False"], True)
    assert plan.teacher["MODEL"]["WEIGHTS"] == str(weights)
    teacher = plan.recipe["DISTILL"]["TEACHER"]
    assert teacher["WEIGHTS"] == str(tmp_path / "run" / "teacher" / "model_final.pth")
    assert teacher["FOLD_NORMS"] is False


def test_heads_of_the_teacher_are_for_the_data_that_it_is_trained_on(own_data, tmp_path):
    """A registered set, whose number of classes no file tells, with a file to evaluate on."""
    opts = ["MODEL.FCOS.NUM_CLASSES", "2", *own_data[2:]]
    teacher = make_plan(STUDENT, TEACHER, [], opts, finetune=True).teacher
    assert teacher["MODEL"]["FCOS"]["NUM_CLASSES"] == 2


def test_a_recipe_names_its_teacher_from_everywhere(own_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan(STUDENT, TEACHER, [], [*own_data, "OUTPUT_DIR", "run"], finetune=True)
    teacher = plan.recipe["DISTILL"]["TEACHER"]
    assert teacher["CONFIG"] == str(tmp_path / "run" / "teacher" / "recipe.yaml")
    assert teacher["WEIGHTS"] == str(tmp_path / "run" / "teacher" / "model_final.pth")


def test_a_recipe_of_another_run_is_kept(tmp_path):
    write_recipe(str(tmp_path), {"SEED": 3}, ["of a command that failed before it had trained"])
    path = write_recipe(str(tmp_path), {"SEED": 1}, ["mine"])
    (tmp_path / "model_0000009.pth").touch()
    assert write_recipe(str(tmp_path), {"SEED": 1}, []) == path
    with pytest.raises(UserError, match="recipe.yaml is of another run"):
        write_recipe(str(tmp_path), {"SEED": 2}, [])
    assert (tmp_path / "recipe.yaml").read_text() == "# mine\nSEED: 1\n"
    write_recipe(str(tmp_path), {"SEED": 2}, [], replace=True)
    assert (tmp_path / "recipe.yaml").read_text() == "SEED: 2\n"


def test_values_are_read_as_on_a_command_line():
    words = ["A.B", "(1, 2)", "A.C", "cpu", "D", "0.5", "E", "''", "F", 3, "G", "[p3, p4]"]
    words += ["H", "((8,), (16, 32))"]
    expected = {"A": {"B": [1, 2], "C": "cpu"}, "D": 0.5, "E": "", "F": 3, "G": ["p3", "p4"]}
    expected["H"] = [[8], [16, 32]]
    assert nested(words) == expected and yaml.safe_load(yaml.safe_dump(expected)) == expected


@pytest.mark.parametrize(
    "seconds, text", [(40, "about 40 s"), (600, "about 10 min"), (20000, "about 6 h")]
)
def test_times_in_words(seconds, text):
    assert in_words(seconds) == text


@pytest.mark.parametrize("status", [0, 3])
def test_a_teacher_that_fails_ends_the_run(tmp_path, monkeypatch, status):
    said = f"import sys; print(sys.argv[1:]); sys.exit({status})"
    monkeypatch.setattr(finetune, "train_command", lambda: [sys.executable, "-c", said])
    with pytest.raises(SystemExit) if status else contextlib.nullcontext() as end:
        finetune.train_teacher(str(tmp_path / "recipe.yaml"), ["--num-gpus", "1"])
    assert not status or end.value.code == status


def test_described_data_are_their_files_again():
    cfg = read_config(f"{STUDENT}.yaml")
    files = [{"json": "a.json", "images": "a"}, {"voc": "b", "split": "val"}]
    cfg.DATASETS.DESCRIBED = [
        {**entry, "name": name, "classes": ["cat"]} for name, entry in zip("ab", files)
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("a", "other"), ("b",)
    assert described_datasets(cfg) == {"TRAIN": [files[0], "other"], "TEST": [files[1]]}

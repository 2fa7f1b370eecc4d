"""``d2kd train`` with names in place of a config file."""

import subprocess
import sys

import pytest

from d2kd.cli import train
from d2kd.cli.main import main
from d2kd.config import read_config
from d2kd.engine.folder_lock import _let_go as let_go
from d2kd.errors import UserError

TINY = "shapes/baselines/fcos_tiny"
NAMES = ["--student", TINY, "--teacher", f"{TINY}_teacher"]


@pytest.fixture
def started(monkeypatch):
    """What the command would start, in order: (config file, overrides)."""
    runs = []

    def start(args, prepare):
        prepare(args)
        runs.append((args.config_file, args.opts))

    monkeypatch.setattr(train, "start", start)
    monkeypatch.setattr(train, "train_teacher", lambda path, options: runs.append((path, options)))
    monkeypatch.setattr(train, "seconds_of_training", lambda cfg, processes: 7200.0 / processes)
    return runs


def test_names_become_a_config_file(started, tmp_path, capsys):
    opts = ["SOLVER.MAX_ITER", "5", "OUTPUT_DIR", str(tmp_path)]
    main(["train", *NAMES, "--method", "PKD", "--method", "MGD", *opts])
    ((path, overrides),) = started
    assert path == str(tmp_path / "recipe.yaml") and overrides == []
    cfg = read_config(path)
    assert cfg.DISTILL.METHODS == ["PKD", "MGD"] and cfg.SOLVER.MAX_ITER == 5
    assert "method   PKD, MGD: as asked" in capsys.readouterr().out


def test_the_recipe_of_a_run_in_progress_stays(started, tmp_path):
    words = ["train", *NAMES, "OUTPUT_DIR", str(tmp_path)]
    main([*words, "--method", "PKD"])
    before = (tmp_path / "recipe.yaml").read_text()
    hold = f"from d2kd.engine.folder_lock import hold_folder; hold_folder({str(tmp_path)!r})"
    script = f"import time; {hold}; print('held', flush=True); time.sleep(100)"
    let_go()
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit):
            main([*words, "--method", "MGD"])
    finally:
        other.kill()
    assert (tmp_path / "recipe.yaml").read_text() == before


def test_the_teachers_run_comes_first_and_once(started, tmp_path, capsys):
    words = ["train", *NAMES, "--finetune-teacher", "OUTPUT_DIR", str(tmp_path)]
    main(words)
    teacher, student = (path for path, _ in started)
    assert teacher == str(tmp_path / "teacher/recipe.yaml") and student == f"{tmp_path}/recipe.yaml"
    said = capsys.readouterr().out
    assert "step 1   the teacher: 750 iterations of 8 images, about 2 h" in said
    assert "step 2   the student: 750 iterations of 8 images, about 2 h" in said
    (tmp_path / "teacher/model_final.pth").touch()
    main([*words, "--resume"])
    assert [path for path, _ in started[2:]] == [student]
    assert "step 1   the teacher is trained already" in capsys.readouterr().out


def test_a_student_that_could_not_start_is_told_before_its_teacher_is_trained(
    started, tmp_path, capsys
):
    opts = ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "/nowhere.pth"]
    with pytest.raises(SystemExit):
        main(["train", *NAMES, "--finetune-teacher", "--num-gpus", "0", *opts])
    assert "MODEL.WEIGHTS is '/nowhere.pth': no such file" in capsys.readouterr().err
    assert not started


def test_a_student_may_start_from_the_teacher_that_is_trained_first(started, tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", f"{tmp_path}/teacher/model_final.pth"]
    main(["train", *NAMES, "--finetune-teacher", "--num-gpus", "0", *opts])
    assert len(started) == 2


def test_changes_can_be_insisted_on_by_names(started, tmp_path, monkeypatch):
    words = ["train", *NAMES, "--finetune-teacher", "--num-gpus", "0", "OUTPUT_DIR", str(tmp_path)]
    main([*words, "SOLVER.MAX_ITER", "5"])
    teacher = (tmp_path / "teacher" / "recipe.yaml").read_text()
    (tmp_path / "model_final.pth").touch()
    (tmp_path / "teacher" / "model_0000001.pth").touch()  # it has not come to its end
    with pytest.raises(SystemExit):
        main([*words, "SOLVER.MAX_ITER", "9", "--resume"])
    student, asked = (tmp_path / "recipe.yaml").read_text(), []

    def refuse(args):
        asked.append(read_config(args.config_file, args.opts).SOLVER.MAX_ITER)
        raise UserError("it cannot go on")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "setup", refuse)
        main([*words, "SOLVER.MAX_ITER", "9", "--force-resume"])
    assert asked == [9] and (tmp_path / "recipe.yaml").read_text() == student
    monkeypatch.setattr(train, "setup", lambda args: None)
    main([*words, "SOLVER.MAX_ITER", "9", "--force-resume"])
    assert read_config(str(tmp_path / "recipe.yaml")).SOLVER.MAX_ITER == 9
    assert (tmp_path / "teacher" / "recipe.yaml").read_text() == teacher
    students = [path for path, _ in started if path == f"{tmp_path}/recipe.yaml"]
    assert len(students) == 2


def test_both_steps_are_shown_as_they_will_run(started, tmp_path, capsys):
    scaled = ["SOLVER.REFERENCE_WORLD_SIZE", "4"]
    main(["train", *NAMES, "--finetune-teacher", "OUTPUT_DIR", str(tmp_path), *scaled])
    said = capsys.readouterr().out
    assert said.count(": 3000 iterations of 2 images, about 2 h") == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["--student", "a"], "--teacher is missing"),
        (["--method", "FRS"], "--student is missing"),
        ([*NAMES, "--config-file", "a.yaml"], "--config-file does not go with --student"),
        ([*NAMES, "SEED"], "give pairs of KEY VALUE, not 1 words: ['SEED']"),
        ([*NAMES, "--eval-only"], "--eval-only does not go with --student"),
    ],
)
def test_what_does_not_go_together_is_one_line(started, capsys, words, message):
    with pytest.raises(SystemExit):
        main(["train", *words])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not started


def test_a_folder_with_a_run_is_not_touched(started, tmp_path, capsys):
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(SystemExit):
        main(["train", *NAMES, "OUTPUT_DIR", str(tmp_path)])
    assert "holds a finished run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model_final.pth"] and not started

"""Trainings in processes of their own: which command they are started with."""

import os
import subprocess
import sys

import pytest

from d2kd import command
from d2kd.cli.main import main
from d2kd.comparison import runs
from d2kd.comparison.rows import Row
from d2kd.pairing import finetune


def test_without_a_script_it_is_d2kd(monkeypatch):
    monkeypatch.setattr(command, "_script", None)
    assert command.train_command() == [sys.executable, "-m", "d2kd", "train"]


@pytest.mark.parametrize(
    "program, words",
    [
        ("/venv/bin/d2kd", ["d2kd"]),
        ("/code/d2kd/__main__.py", ["d2kd"]),  # python -m d2kd
        ("train_net.py", ["d2kd"]),
        ("my_d2kd.py", ["python", "my_d2kd.py"]),
    ],
)
def test_commands_are_shown_as_the_user_types_them(monkeypatch, program, words):
    monkeypatch.setattr(sys, "argv", [program, "compare", "--commands"])
    assert command.typed_command() == words
    shown = runs.command(Row("x", "x.yaml", []), 1, "out")
    assert shown.startswith(f"{' '.join(words)} train --config-file ")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """A script of one's own that says what it was started with, and has called ``main``."""
    monkeypatch.setattr(command, "_script", None)
    path = tmp_path / "mine.py"
    path.write_text("import sys; open('words', 'w').write(' '.join(sys.argv))")
    monkeypatch.chdir(tmp_path)
    main(["--version"], script="mine.py")
    return path


def test_with_a_script_it_is_the_script(script, monkeypatch, tmp_path):
    words = command.train_command()
    assert words == [sys.executable, str(script), "train"]
    monkeypatch.chdir(tmp_path.parent)  # which may be another folder by then
    subprocess.run(words, check=True)
    assert (tmp_path.parent / "words").read_text() == f"{script} train"


def test_a_teacher_is_trained_with_it(script, tmp_path):
    recipe = os.path.join("run", "recipe.yaml")
    finetune.train_teacher(recipe, ["--num-gpus", "2"])
    said = (tmp_path / "words").read_text()
    assert said == f"{script} train --config-file {recipe} --num-gpus 2"

"""The command: its overview, its help, and what it does without Detectron2."""

import os
import shlex
import subprocess
import sys
import warnings

import pytest

from d2kd import __version__
from d2kd.cli.main import COMMANDS, main, make_parser, module_of


@pytest.fixture
def said(capsys):
    def run(*words):
        status = 0
        try:
            main(list(words))
        except SystemExit as end:
            if isinstance(end.code, str):
                return 1, end.code
            status = end.code or 0
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_the_overview_names_every_command(said):
    status, text = said()
    assert status == 0 and all(f"  {command.name} " in text for command in COMMANDS)
    assert said("--help") == (status, text)


def test_version(said):
    assert said("--version") == (0, f"d2kd {__version__}\n")


def test_an_unknown_command_gets_the_nearest(said):
    assert said("trian") == (1, "error: d2kd has no command 'trian': did you mean 'train'?")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_shows_an_example(command):
    text = make_parser(command, module_of(command)).format_help()
    assert f"usage: d2kd {command.name}" in text and f"\n  d2kd {command.name}" in text


@pytest.mark.parametrize(
    "command, status, error",
    [
        ("list >&-", 0, ""),
        ("list >/dev/full", 1, "error: what this command prints cannot be written: No space left"),
    ],
)
def test_an_output_that_is_closed_or_full(command, status, error):
    words = f"{shlex.quote(sys.executable)} -W ignore -m d2kd {command}"
    done = subprocess.run(["bash", "-c", words], stderr=subprocess.PIPE, text=True)
    assert done.returncode == status and done.stderr.startswith(error)
    assert done.stderr.count("\n") == bool(error)


def test_a_folder_that_was_removed(said, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    status, text = said("list")
    monkeypatch.chdir(tmp_path)
    assert status == 1 and "the current folder is not there any more" in text


def test_what_is_wrong_is_one_line(said):
    status, text = said("eval", "/nowhere")
    assert status == 1
    assert text.startswith("error: '/nowhere' is not there") and text.count("\n") == 1


def test_nobody_is_warned_of_what_detectron2_calls(said):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        said("explain", "SEED")
        warnings.warn("torch.meshgrid: in an upcoming release, ...", stacklevel=1)
    assert not [x for x in told if "meshgrid" in str(x.message)]


@pytest.mark.parametrize("rank, lines", [("0", True), ("1", False)])
def test_of_torchruns_processes_one_says_what_is_wrong_with_the_words(
    said, monkeypatch, rank, lines
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_RANK", rank)
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    status, text = said("train", "--config-fil", "x.yaml", "--num-gpus", "two")
    assert status == 2 and ("invalid int value: 'two'" in text) is bool(text) is lines
    assert bool(waited) is not lines


@pytest.mark.parametrize(
    "missing, remedy",
    [("detectron2", "python -m d2kd.install_detectron2"), ("pkg_resources", '"setuptools<82"')],
)
def test_a_missing_module_is_one_line_that_names_the_remedy(tmp_path, missing, remedy):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text(
        f"raise ModuleNotFoundError('none', name={missing!r})"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([str(tmp_path), root])
    result = subprocess.run(
        [sys.executable, "-m", "d2kd", "train"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert remedy in result.stderr

"""``d2kd completion``: every sub-command and option, as a shell completes them."""

import shutil
import subprocess

import pytest

from d2kd.cli import completion
from d2kd.cli.main import COMMANDS, main


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_and_options(capsys):
    main(["completion", "bash"])
    script = capsys.readouterr().out
    ask = """
    _complete() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); "$function" d2kd
                  printf '%s\\n' "${COMPREPLY[@]}"; echo; }
    function=$(complete -p d2kd | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    _complete d2kd ''; _complete d2kd train --fi
    """
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True)
    commands, options = (part.split() for part in done.stdout.split("\n\n")[:2])
    assert {command.name for command in COMMANDS} <= set(commands)
    assert options == ["--finetune-teacher"]


def test_without_shtab_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(completion, "shtab", None)
    with pytest.raises(SystemExit):
        main(["completion", "zsh"])
    assert "pip install 'd2kd[completion]'" in capsys.readouterr().err

"""How a command ends when something from outside ends it."""

import os
import signal

import pytest

from d2kd.errors import UserError
from d2kd.one_line import exit_on_user_error


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_is_one_line(capsys, number, status):
    before = signal.getsignal(number)
    cleaned = []
    with pytest.raises(SystemExit) as stop, exit_on_user_error(debug=False):
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)
    assert stop.value.code == status and cleaned
    assert capsys.readouterr().err == f"Stopped by {number.name}: what was saved stays\n"
    assert signal.getsignal(number) == before


def test_a_closing_terminal_is_ignored_where_nohup_has_it_ignored(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_user_error(debug=False):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().err == ""


def test_a_second_signal_while_the_line_is_printed_changes_nothing(capsys):
    def again():
        os.kill(os.getpid(), signal.SIGINT)
        return True

    with pytest.raises(SystemExit) as stop, exit_on_user_error(False, again):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "Stopped by SIGINT: what was saved stays\n"


def test_a_forked_process_ends_at_the_signal_without_a_word(capfd):
    with exit_on_user_error(debug=False):
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert capfd.readouterr() == ("", "")


def test_whoever_is_not_the_first_says_nothing(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error(False, lambda: False):
        raise UserError("what another process says too")
    assert stop.value.code == 1 and capsys.readouterr().err == ""


def test_names_with_breaks_and_escapes_stay_on_one_line(capsys):
    with pytest.raises(SystemExit), exit_on_user_error(debug=False):
        raise UserError("no\nsuch \x1b[31mfile \udce9 ü")
    assert capsys.readouterr().err == "error: no\\nsuch \\x1b[31mfile \\udce9 ü\n"


def test_a_file_that_cannot_be_used_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error(debug=False):
        tmp_path.read_text()
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"


def test_other_errors_of_the_system_keep_their_traceback():
    with pytest.raises(BrokenPipeError), exit_on_user_error(debug=False):
        raise BrokenPipeError

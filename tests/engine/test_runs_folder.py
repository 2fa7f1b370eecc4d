"""Which of the files in a run's folder is read."""

import pytest

from d2kd.engine.runs import TrainedRun


@pytest.mark.parametrize("names", [("yaml", "py"), ("py",)])
def test_a_program_is_read_only_where_there_is_no_yaml(tmp_path, names):
    for name in names:
        (tmp_path / f"config.{name}").touch()
        (tmp_path / f"student.{name}").touch()
    run = TrainedRun(str(tmp_path), "", ())
    assert run.config_file == str(tmp_path / f"config.{names[0]}")
    assert run.student_file == str(tmp_path / f"student.{names[0]}")

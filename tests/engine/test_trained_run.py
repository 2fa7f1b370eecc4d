"""Which of the files in a run's folder is read."""

import pytest
import torch

from d2kd.engine.trained_run import TrainedRun, open_run


@pytest.mark.parametrize("names", [("yaml", "py"), ("py",)])
def test_a_program_is_read_only_where_there_is_no_yaml(tmp_path, names):
    for name in names:
        (tmp_path / f"config.{name}").touch()
        (tmp_path / f"student.{name}").touch()
    run = TrainedRun(str(tmp_path), "", ())
    assert run.config_file == str(tmp_path / f"config.{names[0]}")
    assert run.student_file == str(tmp_path / f"student.{names[0]}")


def test_a_run_that_was_made_longer_is_read_from_where_it_is(tmp_path):
    (tmp_path / "student.yaml").touch()
    for name in ("model_final.pth", "model_0001499.pth"):
        torch.save({"model": {}}, tmp_path / name)
    assert open_run(str(tmp_path)).weights.endswith("model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_0001499.pth")
    assert open_run(str(tmp_path)).weights.endswith("model_0001499.pth")

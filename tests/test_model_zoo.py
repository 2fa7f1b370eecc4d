"""Where a config is looked for, and its weights."""

import pytest

from d2kd.errors import UserError
from d2kd.model_zoo import resolve_config, trained_weights, zoo_weights


def make_run(name):
    folder = name.parent
    folder.mkdir(parents=True)
    for file in (name, folder / "model_final.pth"):
        file.touch()


def test_a_config_in_a_runs_folder_has_that_runs_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("teacher", "student"):  # the second one is where student.yaml would be trained
        make_run(tmp_path / f"output/{run}/student.yaml")
    assert trained_weights("output/teacher/student.yaml") == "output/teacher/model_final.pth"


def test_any_other_config_has_those_of_its_usual_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "output/mine/student.yaml")
    assert trained_weights("configs/mine.yaml") == "output/mine/model_final.pth"
    assert trained_weights("configs/other.yaml") == ""


def test_the_ending_of_a_name_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("shapes/frs/fcos_tiny", "COCO-Detection/retinanet_R_50_FPN_1x"):
        path = resolve_config(name, "config")
        assert path.endswith(f"{name}.yaml") and path == resolve_config(f"{name}.yaml", "config")
    assert zoo_weights(path).endswith(".pkl")
    (tmp_path / "mine.yaml").touch()
    assert resolve_config("mine", "config") == "mine.yaml"
    with pytest.raises(UserError, match="config is 'mines': no such file"):
        resolve_config("mines", "config")
    with pytest.raises(UserError, match="did you mean 'shapes/frs/fcos_tiny'"):
        resolve_config("shapes/frs/fcos_tny.yaml", "config")

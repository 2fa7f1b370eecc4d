"""Where the weights of a config are looked for."""

from d2kd.model_zoo import trained_weights


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

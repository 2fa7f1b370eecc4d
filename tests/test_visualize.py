"""The picture of a method's maps."""

import os
import sys

import cv2
import pytest
from toys import STUDENTS, distill_config

TOOLS = os.path.join(os.path.dirname(__file__), os.pardir, "tools")


def run(monkeypatch, folder, toy_dataset, methods, opts=()):
    monkeypatch.syspath_prepend(TOOLS)
    import visualize

    weights = distill_config(folder, "RetinaNet").DISTILL.TEACHER.WEIGHTS
    argv = ["visualize.py", STUDENTS["RetinaNet"], "--output", str(folder / "maps.png")]
    argv += ["DATASETS.TRAIN", repr(toy_dataset[:1]), "DISTILL.METHODS", repr(methods)]
    argv += ["DISTILL.TEACHER.CONFIG", STUDENTS["RetinaNet"], "DISTILL.TEACHER.WEIGHTS", weights]
    argv += ["DISTILL.TEACHER.OPTS", "['MODEL.BASIC_RESNET.WIDTH', 16]", *opts]
    monkeypatch.setattr(sys, "argv", argv)
    visualize.main()


def test_one_row_per_image_and_method(monkeypatch, tmp_path, toy_dataset, capsys):
    run(monkeypatch, tmp_path, toy_dataset, ["DeFeat", "FRS"])
    assert capsys.readouterr().out.strip().endswith("DeFeat, 5 levels, FRS, 5 levels")
    height, width, _ = cv2.imread(str(tmp_path / "maps.png")).shape
    assert (height, width) == (4 * 300, 6 * 300)


def test_nothing_to_show_is_one_line(monkeypatch, tmp_path, toy_dataset, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, toy_dataset, [])
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: DISTILL.METHODS is empty") and "\n" not in error

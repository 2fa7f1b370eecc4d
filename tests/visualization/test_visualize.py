"""``d2kd visualize``: the picture of a method's maps."""

import math

import cv2
import numpy as np
import pytest
import torch
import yaml
from toys import STUDENTS, distill_config

from d2kd.checkpoint import StudentCheckpointer
from d2kd.cli import visualize
from d2kd.cli.main import main
from d2kd.distillation import build_model
from d2kd.visualization import maps
from d2kd.visualization.maps import Attention
from d2kd.visualization.pictures import mean_by_size


def run(monkeypatch, folder, toy_dataset, methods, opts=(), teacher="RetinaNet", name="maps.png"):
    cfg = distill_config(folder, "RetinaNet", teacher=teacher)
    argv = ["visualize", STUDENTS["RetinaNet"], "--output", str(folder / name)]
    argv += ["DATASETS.TRAIN", repr(toy_dataset[:1]), "DISTILL.METHODS", repr(methods)]
    argv += ["DISTILL.TEACHER.CONFIG", STUDENTS[teacher]]
    argv += ["DISTILL.TEACHER.WEIGHTS", cfg.DISTILL.TEACHER.WEIGHTS]
    argv += ["DISTILL.TEACHER.OPTS", repr(cfg.DISTILL.TEACHER.OPTS), *opts]
    monkeypatch.setattr(maps, "NUM_BATCHES", 2)
    main(argv)


def test_one_row_per_image_and_method(monkeypatch, tmp_path, toy_dataset, capsys):
    run(monkeypatch, tmp_path, toy_dataset, ["DeFeat", "FRS"])
    assert (
        capsys.readouterr()
        .out.strip()
        .endswith("DeFeat: objects, 5 levels, FRS: the teacher's score, 5 levels")
    )
    height, width, _ = cv2.imread(str(tmp_path / "maps.png")).shape
    assert (height, width) == (4 * 300, 6 * 300)


GDETKD = ["DISTILL.GDETKD.CLS.WEIGHT", "0.0", "DISTILL.GDETKD.BBOX.WEIGHT", "0.0"]
GDETKD += [
    "DISTILL.FRS.CLS.WEIGHT",
    "0.0",
    "DISTILL.GDETKD.QUEUE_SIZE",
    "8",
    "DISTILL.GDETKD.DENSE.ROIS_PER_IMAGE",
    "32",
]


def checkpoint(folder, temperature, methods=("GDetKD",)):
    """A run's checkpoint, in which one level of a region gets all the attention or none does."""
    opts = [yaml.safe_load(x) if i % 2 else x for i, x in enumerate(GDETKD)]
    cfg = distill_config(folder, "RetinaNet", opts, teacher="FasterRCNN", methods=methods)
    model = build_model(cfg)
    torch.nn.init.constant_(
        model.distillers["GDetKD"].imitation.log_temperature, math.log(temperature)
    )
    StudentCheckpointer(model.student, str(folder), distillers=model.distillers).save("run")
    return str(folder / "run.pth")


def test_attention_is_that_of_the_checkpoint(monkeypatch, tmp_path, toy_dataset, capsys):
    kept, draw = [], visualize.draw
    keep = lambda cfg, looked: kept.append(looked.attention) or draw(cfg, looked)  # noqa: E731
    monkeypatch.setattr(visualize, "draw", keep)
    for temperature in (100.0, 0.01):
        opts = [*GDETKD, "MODEL.WEIGHTS", checkpoint(tmp_path, temperature)]
        run(monkeypatch, tmp_path, toy_dataset, ["GDetKD"], opts, teacher="FasterRCNN")
    assert capsys.readouterr().out.strip().endswith("GDetKD, 5 levels, 128 regions")
    flat, sharp = kept
    for attention in kept:
        assert attention.levels == ["p3", "p4", "p5", "p6", "p7"]
        assert attention.sizes.shape == (128,) and (attention.sizes > 0).all()
        assert np.allclose(attention.weights.sum(axis=0), 1, atol=1e-5)
    assert flat.weights.max() < sharp.weights.max() and flat.weights.max() < 0.5


def test_attention_is_averaged_by_size():
    sizes = np.array([16.0, 17.0, 0.0, 64.0])  # half an octave above 16 is 22.6
    weights = np.array([[0.2, 0.4, 1.0, 0.9], [0.8, 0.6, 0.0, 0.1]])
    at, means = mean_by_size(Attention(["p3", "p4"], sizes, weights))
    assert at.tolist() == [1, 16, 64]
    assert np.allclose(means, [[1.0, 0.3, 0.9], [0.0, 0.7, 0.1]])


def test_maps_and_attention_in_one_picture(monkeypatch, tmp_path, toy_dataset, capsys):
    methods = ["FRS", "GDetKD"]
    opts = [*GDETKD, "MODEL.WEIGHTS", checkpoint(tmp_path, 1.0, methods)]
    run(monkeypatch, tmp_path, toy_dataset, methods, opts, teacher="FasterRCNN")
    out = capsys.readouterr().out.strip()
    assert out.endswith("FRS: the teacher's score, 4 levels, GDetKD, 5 levels, 128 regions")
    height, width, _ = cv2.imread(str(tmp_path / "maps.png")).shape
    assert (height, width) == (3 * 300, 5 * 300)


@pytest.mark.parametrize(
    "opts, message",
    [
        ([], "MODEL.WEIGHTS is '': give a checkpoint of the recipe's run"),
        (["DISTILL.GDETKD.EMBED_DIMS", "[8, 8]"], "does not hold the adapters of this recipe"),
        (
            ["DISTILL.GDETKD.MATCH", "assigned"],
            "(DeFeat, FRS, HGD do, and GDetKD with MATCH soft)",
        ),
    ],
)
def test_no_attention_is_one_line(monkeypatch, tmp_path, toy_dataset, capsys, opts, message):
    given = [*GDETKD, *opts]
    if "DISTILL.GDETKD.EMBED_DIMS" in opts:
        given += ["MODEL.WEIGHTS", checkpoint(tmp_path, 1.0)]
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, toy_dataset, ["GDetKD"], given, teacher="FasterRCNN")
    printed = capsys.readouterr().err.splitlines()  # other tests may have set up logging
    (error,) = [line for line in printed if line.startswith("error: ")]
    assert message in error and printed[-1] == error


def test_nothing_to_show_is_one_line(monkeypatch, tmp_path, toy_dataset, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, toy_dataset, [])
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: DISTILL.METHODS is empty") and "\n" not in error


def test_a_picture_has_a_known_ending(monkeypatch, tmp_path, toy_dataset, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, toy_dataset, ["FRS"], name="maps.tiff")
    assert "give a name with .jpg, .pdf, .png, .svg" in capsys.readouterr().err


def test_any_method_that_weighs_places_is_shown(monkeypatch, tmp_path, toy_dataset, capsys):
    run(monkeypatch, tmp_path, toy_dataset, ["HGD"], ["DISTILL.HGD.SOURCE", "backbone"])
    assert "HGD: micro weights, mean of the channels, " in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_told_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["visualize", "shapes/frs/fcos_tiny", "--output", str(tmp_path / "no" / "x.png")])
    assert f"there is no folder '{tmp_path / 'no'}'" in capsys.readouterr().err

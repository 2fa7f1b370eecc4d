"""``d2kd list`` and ``d2kd explain``: what they say follows from the code and the configs."""

import re

import pytest

from d2kd.catalogue import explain, listing
from d2kd.catalogue.configs import configs, recipes
from d2kd.catalogue.keys import all_keys, what_it_may_be
from d2kd.catalogue.known_numbers import measured_costs
from d2kd.catalogue.listing import KINDS
from d2kd.cli.main import main
from d2kd.config import default_config, read_config
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.model_zoo import find_config
from d2kd.schema import Key, get_value

METHODS = [name for name, _ in DISTILLER_REGISTRY]


def lines(kind, *args):
    return listing(kind, *args).splitlines()[2:]


def test_every_method_is_listed():
    text = listing("methods")
    assert all(re.search(rf"^{name} ", text, re.MULTILINE) for name in METHODS)


def test_recipes_are_those_that_distil():
    names = [line.split()[0] for line in lines("recipes")]
    assert len(names) == len(set(names)) == len(recipes()) > 115
    assert "shapes/frs/fcos_tiny" in names and "baselines/gfl_R_50_FPN_1x" not in names
    (line,) = lines("recipes", "CrossKD", ["GFL", "r_101", "pkd", "mmdet"])
    assert line.split() == [
        *("crosskd/gfl_pkd_R_50_R_101-ms-2x-mmdet_1x", "CrossKD,", "PKD"),
        *("mmdet/gfl_R_101_FPN_ms_2x", "43.9"),
    ]


@pytest.mark.parametrize("name", ["hgd/faster_rcnn_R_50_R_101-voc_voc", "shapes/frs/fcos_tiny"])
def test_a_recipe_is_read_as_training_reads_it(name):
    config, cfg = configs()[name], read_config(f"{name}.yaml")
    assert (config.methods, config.teacher) == (cfg.DISTILL.METHODS, cfg.DISTILL.TEACHER.CONFIG)


def test_teachers_have_weights_or_have_to_be_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of = {line.split()[0]: line for line in lines("teachers")}
    assert of["shapes/baselines/fcos_tiny_teacher"].endswith("d2kd://fcos_tiny_teacher.pth")
    assert of["mmdet/gfl_R_101_FPN_ms_2x"].split()[1:] == ["44.7", "MMDetection's"]
    assert of["baselines/gfl_R_101_FPN_ms_2x"].endswith("to be trained")
    assert of["COCO-Detection/retinanet_R_101_FPN_3x"].split()[1:] == ["40.4", "Detectron2's"]
    assert all(find_config(f"{name}.yaml") for name in of)


@pytest.mark.parametrize(
    "args, message",
    [
        (["recipes", "FRSS"], "--method is 'FRSS': did you mean 'FRS'"),
        (["recipes", "FRS", ["nosuch"]], "recipes has nosuch"),
    ],
)
def test_an_empty_list_says_why(args, message):
    with pytest.raises(UserError, match=message):
        listing(*args)


def test_a_method_without_recipes_is_not_a_matter_of_words(monkeypatch):
    monkeypatch.setitem(KINDS, "recipes", lambda method: [])  # as of one from elsewhere
    with pytest.raises(UserError, match="^--method is 'FRS', for which d2kd has no recipes: write"):
        listing("recipes", "FRS")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_explained(name):
    text = explain(name)
    key = DISTILLER_REGISTRY.get(name).node_name()
    assert text.startswith(f"{name}: ") and f"Keys, below {key}" in text
    assert "\nReads, for instance between " in text and f"\n  {name.lower()}/" in text.lower()


def test_detectors_that_a_method_works_between():
    text = explain("LD")
    assert "\n  GFL        GFL\n" in text and "\n  RetinaNet  none\n" in text
    assert "\n  two-stage  of any kind\n" in explain("pkd")
    # Scores of single anchors are compared, and FCOS and ATSS have other anchors
    assert "\n  FCOS       FCOS, PaperFCOS\n" in explain("FRS")


def test_what_is_said_of_a_recipe():
    text = explain("configs/crosskd/gfl_R_50_R_101-ms-2x-mmdet_1x.yaml")
    # What wins comes first
    assert "based on baselines/gfl_R_50_FPN_1x, base/torchvision-R-50, base/" in text
    assert "reported 43.7 AP, source: authors" in text
    assert text.endswith("d2kd train --config-file crosskd/gfl_R_50_R_101-ms-2x-mmdet_1x.yaml")
    assert "reported 43.7 AP" in explain("crosskd/gfl_R_50_R_101-ms-2x_1x")  # teacher trained first


def test_what_is_said_of_a_table():
    text = explain("configs/shapes/defeat/retinanet_tiny_ablation.yaml")
    assert "\nrows\n  objects only\n" in text
    assert text.endswith("compare shapes/defeat/retinanet_tiny_ablation.yaml")


def test_what_is_said_of_keys():
    text = explain("DISTILL.FRS.CLS.WEIGHT")
    assert "it is a number, 0 or more" in text and "FCOS students 0.05 (the authors'" in text
    assert explain("solver.max_iter").startswith("SOLVER.MAX_ITER: a key of Detectron2's")
    assert "DISTILL.FRS.FEATURE" in explain("DISTILL.FRS")
    with pytest.raises(UserError, match="did you mean 'DISTILL.FRS.CLS.WEIGHT'"):
        explain("DISTILL.FRS.CLS.WEIGTH")


def test_declared_defaults_are_those_of_the_config():
    """Also of Detectron2's keys, which d2kd declares to refuse their wrong values."""
    cfg = default_config()
    in_config = {name: get_value(cfg, name) for name in all_keys()}
    assert in_config == {name: key.default for name, key in all_keys().items()}


@pytest.mark.parametrize(
    "key, text",
    [
        (Key(0.5, low=0, high=1), "a number, 0 ... 1"),
        (Key(1, above=0), "a whole number, above 0"),
        (Key([], item=str), "a list, each a name"),
        (Key("a", choices=("a", "b")), "one of 'a', 'b'"),
    ],
)
def test_what_a_key_may_be(key, text):
    assert what_it_may_be(key) == text


def test_every_key_has_a_help():
    assert [name for name, key in all_keys().items() if not key.help] == []


def test_costs_are_of_recipes_that_are_there():
    names = [costs.case.recipe[: -len(".yaml")] for costs in measured_costs()]
    assert names and all(name in configs() for name in names)
    assert "times a plain step, " in explain("FRS") and "Cost" not in explain("MGD")


def test_commands(capsys):
    main(["list", "recipes", "fcos_tiny", "--method", "FRS"])
    main(["explain", "shapes/frs/fcos_tiny"])
    assert "d2kd train --config-file shapes/frs/fcos_tiny.yaml" in capsys.readouterr().out

"""What a run keeps of its config, and which nodes of methods count: those that it trains with."""

import pytest
import yaml

from d2kd.config import read_config
from d2kd.engine import run_config
from d2kd.engine.run_config import changed_settings, config_file, differences, write_run_config
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY, Distiller
from d2kd.methods.core import term

RECIPE, LAZY = "shapes/frs/fcos_tiny.yaml", "shapes/frs/fcos_tiny_lazy.py"


class OwnMethod(Distiller):
    """Of a script outside of d2kd."""

    keys = {"MAPS": term(1.0)}


@pytest.fixture
def own(monkeypatch):
    """Registers it until the end of a test, or until it is called."""
    methods = dict(DISTILLER_REGISTRY._obj_map)
    monkeypatch.setattr(DISTILLER_REGISTRY, "_obj_map", {**methods, "OwnMethod": OwnMethod})
    return lambda: monkeypatch.setattr(DISTILLER_REGISTRY, "_obj_map", methods)


def written(tmp_path, recipe, opts=()):
    """The config of a run as it is written down."""
    lazy = recipe.endswith(".py")
    key, sep = ("train.output_dir", "=") if lazy else ("OUTPUT_DIR", " ")
    words = f"{key}{sep}{tmp_path}".split(" ")
    cfg = read_config(recipe, [*words, *opts])
    write_run_config(cfg)
    return cfg, tmp_path / config_file(cfg)[0]


@pytest.mark.parametrize("recipe", [RECIPE, LAZY])
def test_a_run_opens_without_a_method_that_it_does_not_use(own, tmp_path, recipe):
    cfg, path = written(tmp_path, recipe)
    assert "OWNMETHOD" in cfg.DISTILL and "OWNMETHOD" not in path.read_text()
    own()
    again = read_config(str(path))
    assert again.DISTILL.FRS == cfg.DISTILL.FRS and again.DISTILL.PKD == cfg.DISTILL.PKD
    assert changed_settings(again) == []


@pytest.mark.parametrize("recipe", [RECIPE, LAZY])
def test_changed_defaults_of_a_method_that_is_not_used_are_no_change(
    own, tmp_path, recipe, monkeypatch
):
    written(tmp_path, recipe)
    monkeypatch.setattr(OwnMethod, "keys", {"MAPS": term(2.0), "OTHERS": term(1.0)})
    cfg, _ = written(tmp_path, recipe)
    assert changed_settings(cfg) == []


@pytest.mark.parametrize("recipe", [RECIPE, LAZY])
def test_nor_are_those_in_a_config_of_an_earlier_version(own, tmp_path, recipe, monkeypatch):
    """It has the nodes of all methods."""
    monkeypatch.setattr(run_config, "_without_unused_methods", lambda cfg: cfg)
    _, path = written(tmp_path, recipe)
    assert "OWNMETHOD" in path.read_text()
    own()
    again = read_config(str(path))
    assert again.DISTILL.METHODS == ["FRS"] and "OWNMETHOD" not in again.DISTILL
    assert changed_settings(again) == []


def test_what_a_method_in_use_has_counts(own, tmp_path):
    methods = ["DISTILL.METHODS", ["FRS", "OwnMethod"]]
    cfg, path = written(tmp_path, RECIPE, methods)
    assert yaml.safe_load(path.read_text())["DISTILL"]["OWNMETHOD"]["MAPS"]["WEIGHT"] == 1.0
    cfg.DISTILL.OWNMETHOD.MAPS.WEIGHT = 3.0
    assert changed_settings(cfg) == ["DISTILL.OWNMETHOD.MAPS.WEIGHT was 1.0, is 3.0"]
    cfg.DISTILL.METHODS = ["FRS"]  # says it all
    assert changed_settings(cfg) == ["DISTILL.METHODS was ['FRS', 'OwnMethod'], is ['FRS']"]


@pytest.mark.parametrize("recipe", [RECIPE, LAZY])
def test_a_method_in_use_that_is_not_registered_is_named(own, tmp_path, recipe):
    methods = "distill.METHODS=[OwnMethod]" if recipe == LAZY else "DISTILL.METHODS [OwnMethod]"
    _, path = written(tmp_path, recipe, methods.split(" "))
    own()
    with pytest.raises(UserError, match="METHODS names 'OwnMethod': .* the script that imports"):
        read_config(str(path))


def test_a_mistyped_node_of_a_file_made_by_hand_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"_BASE_: {RECIPE}\nDISTILL: {{FSR: {{CLS: {{WEIGHT: 1.0}}}}}}")
    with pytest.raises(UserError, match="no config key DISTILL.FSR: did you mean 'DISTILL.FRS'"):
        read_config(str(path))


def test_evaluation_counts_only_where_it_is_asked_for():
    cfg = read_config(RECIPE, [])
    saved = yaml.safe_load(config_file(cfg)[1])
    saved["DATASETS"]["TEST"] = ["other"]
    saved["MODEL"]["FCOS"]["NMS_THRESH_TEST"] = 0.1
    saved["RUN"]["KEEP_CHECKPOINTS"] = 2
    assert differences(saved, cfg) == []
    changed = differences(saved, cfg, evaluation=True)
    assert [words.split()[0] for words in changed] == [
        "DATASETS.TEST",
        "MODEL.FCOS.NMS_THRESH_TEST",
    ]

"""Every shipped recipe: it reads, it is short, and its pair can be built and trained."""

import glob
import os
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg

from d2kd.config import add_distill_config, load_yaml
from d2kd.model_zoo import CONFIG_DIRS, resolve_config
from d2kd.modeling import build_family
from d2kd.modeling.build import (
    _check_offers,
    build_detector,
    build_teacher_detector,
    distilled_methods,
)

RECIPES = {
    os.path.relpath(path, folder): path
    for folder in CONFIG_DIRS
    for path in sorted(glob.glob(os.path.join(folder, "*", "*.yaml")))
    if "DISTILL:" in Path(path).read_text()
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_short_and_documented(name):
    with open(RECIPES[name]) as f:
        lines = f.read().splitlines()
    assert lines[0].startswith("# ")
    assert len([line for line in lines if not line.startswith("#")]) <= 15


@pytest.mark.parametrize("name", RECIPES)
def test_pair_of_a_recipe_fits(name):
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, RECIPES[name], ["MODEL.DEVICE", "meta", "MODEL.TIMM.PRETRAINED", False])
    with torch.device("meta"):  # shapes only
        student = build_family(build_detector(cfg))
        teacher = build_family(build_teacher_detector(cfg)[0])
    methods = distilled_methods(cfg)
    assert methods, "nothing is distilled"
    for method in methods.values():
        _check_offers(method, cfg, student, teacher)
        with torch.device("meta"):
            distiller = method(cfg, student, teacher)
        assert distiller.terms


@pytest.mark.parametrize("name", RECIPES)
def test_teacher_is_where_its_config_puts_it(name):
    with open(RECIPES[name]) as f:
        teacher = yaml.safe_load(f).get("DISTILL", {}).get("TEACHER", {})
    weights = teacher.get("WEIGHTS", "")
    if weights.startswith("output/"):
        path = resolve_config(teacher["CONFIG"], "test")
        with open(path) as f:
            assert yaml.safe_load(f)["OUTPUT_DIR"] == os.path.dirname(weights)

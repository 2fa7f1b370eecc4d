"""Every shipped recipe and every row of a file of ablations: it reads, it is short, and teacher and
student fit."""

import glob
import os
from pathlib import Path

import pytest

from d2kd.comparison.rows import read_rows, read_table
from d2kd.config import read_config
from d2kd.distillation import build_teacher_detector
from d2kd.distillation.detectors import build_architecture, on_meta_device
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.model_zoo import CONFIG_DIRS, resolve_config
from d2kd.views import build_family

CONFIGS = {
    os.path.relpath(path, folder): path
    for folder in CONFIG_DIRS
    for path in sorted(glob.glob(os.path.join(folder, "**", "*.yaml"), recursive=True))
}
TABLES = {name: path for name, path in CONFIGS.items() if name.endswith("_ablation.yaml")}
RECIPES = {
    name: path
    for name, path in CONFIGS.items()
    if name not in TABLES and "DISTILL:" in Path(path).read_text()
}
# Label -> (config, overrides): all recipes, and the rows of tables that change something
CASES = {name: (path, []) for name, path in RECIPES.items()}
for table, path in TABLES.items():
    rows = [row for row in read_table(path) if row.opts]
    CASES.update({f"{table}: {row.label}": (row.config, row.opts) for row in rows})


def trained_here(name):
    """The name of the recipe whose teacher is trained here instead of published."""
    return name.replace("-mmdet_", "_")


PUBLISHED_AND_TRAINED = [n for n in RECIPES if "-mmdet_" in n and trained_here(n) in RECIPES]


def test_there_are_recipes_of_every_method():
    assert RECIPES and TABLES
    methods = {name.lower() for name, _ in DISTILLER_REGISTRY}
    folders = {os.path.dirname(name).removeprefix("shapes/") for name in RECIPES}
    assert methods <= folders


@pytest.mark.parametrize("name", [*RECIPES, *TABLES])
def test_stands_in_the_folder_of_a_method(name):
    methods = {method.lower() for method, _ in DISTILLER_REGISTRY}
    assert os.path.dirname(name).removeprefix("shapes/") in methods


@pytest.mark.parametrize("name", [*RECIPES, *TABLES])
def test_is_documented(name):
    assert Path(CONFIGS[name]).read_text().startswith("# ")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_short(name):
    lines = Path(RECIPES[name]).read_text().splitlines()
    assert len([line for line in lines if not line.startswith("#")]) <= 15


@pytest.mark.parametrize("name", CONFIGS)
def test_repeats_nothing_that_follows_from_its_place(name):
    text = Path(CONFIGS[name]).read_text()
    # What tools/pretrain_backbone.py writes is no run, and has no place of its own.
    assert "OUTPUT_DIR" not in text and "output/" not in text.replace(
        "output/shapes/pretrained", ""
    )


@pytest.mark.parametrize("name", RECIPES)
def test_teacher_of_a_recipe_exists(name):
    cfg = read_config(RECIPES[name])
    assert f"output/{os.path.splitext(name)[0]}" == cfg.OUTPUT_DIR
    path = resolve_config(cfg.DISTILL.TEACHER.CONFIG, "test")
    if cfg.DISTILL.TEACHER.CONFIG in CONFIGS:
        folder = os.path.basename(os.path.dirname(path))
        assert folder == ("mmdet" if "-mmdet_" in name else "baselines")
        assert read_config(path).DATASETS.TEST == cfg.DATASETS.TEST


@pytest.mark.parametrize("name", PUBLISHED_AND_TRAINED)
def test_published_and_trained_teacher_are_all_that_differs(name):
    published, trained = read_config(RECIPES[name]), read_config(RECIPES[trained_here(name)])
    config = published.DISTILL.TEACHER.CONFIG
    assert config.replace("mmdet/", "baselines/") == trained.DISTILL.TEACHER.CONFIG
    published.DISTILL.TEACHER.CONFIG = trained.DISTILL.TEACHER.CONFIG
    published.OUTPUT_DIR = trained.OUTPUT_DIR
    assert published == trained


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_changes_something(name):
    plain, *rows = read_rows(TABLES[name])
    assert read_config(plain.config).DISTILL.METHODS == []
    assert {row.config.replace(".yaml", "_ablation.yaml") for row in rows} == {TABLES[name]}
    texts = [read_config(row.config, row.opts).dump() for row in rows]
    assert len(set(texts)) == len(rows)
    # One row is the recipe itself
    assert texts.count(read_config(rows[0].config).dump()) == 1


@pytest.mark.parametrize("case", CASES)
def test_pair_fits(case):
    path, opts = CASES[case]
    cfg = read_config(path, [*opts, "MODEL.TIMM.PRETRAINED", False])
    with on_meta_device():
        student = build_family(build_architecture(cfg, path))
        teacher = build_family(build_teacher_detector(cfg)[0])
        assert cfg.DISTILL.METHODS
        for name in cfg.DISTILL.METHODS:
            method = DISTILLER_REGISTRY.get(name)
            node = method.node_of(cfg)
            method.check_config(node)
            reads = method.reads(node, student, teacher)
            for term in reads.values():
                student.observed(term.student)  # raises CannotRead if it has none
                teacher.observed(term.teacher)
            method.check_pair(node, student, teacher)
            terms = method(node, student, teacher).terms
            assert terms and terms == set(reads) == set(method.enabled_terms(node))

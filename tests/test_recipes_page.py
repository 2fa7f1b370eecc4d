"""docs/recipes.md: it follows from the configs, and its numbers stand in their headers."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from d2kd.catalogue.known_numbers import published
from d2kd.config import read_config

sys.path.append(os.path.join(os.path.dirname(__file__), os.pardir, "tools"))
import recipes_page

ROOT = recipes_page.ROOT
DATA = yaml.safe_load(recipes_page.DATA.read_text())
PAGE = recipes_page.PAGE.read_text()
SOURCES = {"authors", "third party", "note"}


def header(config):
    """The comment at the top of a config, on one line."""
    lines = (recipes_page.CONFIGS / config).read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def read(config, opts=()):
    return read_config(str(ROOT / config), opts)


def test_is_up_to_date():
    tool = [sys.executable, str(ROOT / "tools/recipes_page.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", DATA["recipes"])
def test_numbers_stand_in_the_header(name):
    entry, text = DATA["recipes"][name], header(f"{name}.yaml")
    assert entry.keys() <= {"row", "ap", "source", "plain", "teacher", "weights", "doubt"}
    assert ("ap" in entry) == ("source" in entry) and entry.get("source", "note") in SOURCES
    for key in ("ap", "plain", "teacher", "weights"):
        assert entry.get(key) is None or str(entry[key]) in text, key
    config, baseline = recipes_page.teacher_of(name), recipes_page.baseline_of(name)
    if entry.get("ap") and not config.startswith("COCO-Detection/"):
        ap = entry.get("weights") or published(config)
        assert ap is None or str(ap) in text + header(config)
    if entry.get("ap") and "plain" not in entry:
        assert str(DATA["published"].get(baseline, "")) in text


@pytest.mark.parametrize("config", [x for x in DATA["published"] if x.startswith("baselines/")])
def test_published_numbers_stand_in_the_header(config):
    text = header(config)
    assert f"{DATA['published'][config]} AP" in text
    same = config.replace("baselines/", "mmdet/")
    if (recipes_page.CONFIGS / same).exists():
        assert f"Published AP {DATA['published'][config]}" in header(same)


@pytest.mark.parametrize("name", DATA["recipes"])
def test_teacher_and_baseline_are_those_of_the_run(name):
    cfg = read(f"configs/{name}.yaml")
    assert recipes_page.teacher_of(name) == cfg.DISTILL.TEACHER.CONFIG
    assert recipes_page.iterations_of(name) == cfg.SOLVER.MAX_ITER
    assert cfg.SOLVER.IMS_PER_BATCH == 16  # as the page says
    plain = read(f"configs/{recipes_page.baseline_of(name)}")
    for key in ("INPUT", "DATASETS"):
        assert plain[key] == cfg[key]
    for key in ("CLIP_GRADIENTS", "WARMUP_ITERS"):  # parts of a recipe
        cfg.SOLVER[key] = plain.SOLVER[key]
    assert plain.SOLVER == cfg.SOLVER


@pytest.mark.parametrize("name", DATA["tables"])
def test_numbers_of_a_table_stand_in_its_file(name):
    text = (recipes_page.CONFIGS / f"{name}.yaml").read_text()
    for label, ap in DATA["tables"][name].items():
        assert str(ap) in text, label


def test_every_link_leads_somewhere():
    for page in (recipes_page.PAGE, ROOT / "docs/differences.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_are_of_configs_that_are_there():
    lines = [line for line in PAGE.splitlines() if line.startswith("d2kd train")]
    assert len(lines) >= 2 * len(DATA["methods"])
    for line in lines:
        path = re.search(r"--config-file (\S+\.yaml)", line)[1]
        cfg = read(f"configs/{path}")
        assert cfg.MODEL.WEIGHTS or "--eval-only" not in line
    assert {os.path.dirname(m["commands"]) for m in DATA["methods"].values()} == set(
        DATA["methods"]
    )

"""Pages that follow from the code, or from data beside them, are up to date."""

import sys

import pytest
from detectron2.config import CfgNode, get_cfg
from pages import ROOT, text

from d2kd.config import add_distill_config
from d2kd.evidence.benchmark import STANDARD
from d2kd.evidence.costs import costs_markdown, read_costs

sys.path.append(str(ROOT / "tools"))
import commands_page
import configuration_page

pytestmark = pytest.mark.docs


def keys(node, prefix=""):
    """The full names of all keys of a config."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_configuration_is_that_of_the_code():
    assert configuration_page.PAGE.read_text() == configuration_page.page(), "run the tool"


def test_configuration_holds_every_key_that_d2kd_adds():
    cfg = get_cfg()
    add_distill_config(cfg)
    page = configuration_page.page()
    schedule = ("LEVEL_WEIGHTS", "WARMUP_ITERS", "DECAY", "START_ITER", "STOP_ITER")
    for key in set(keys(cfg)) - set(keys(get_cfg())):
        if key.startswith("DISTILL.") and not key.startswith(
            ("DISTILL.TEACHER", "DISTILL.METHODS")
        ):
            _, method, key = key.split(".", 2)
            assert f"### DISTILL.{method}\n" in page
            key = f"<TERM>.{key.split('.')[-1]}" if key.endswith(schedule) else key
        assert f"| `{key}` |" in page, key


def test_commands_are_those_of_the_parsers():
    page = commands_page.page()
    assert commands_page.PAGE.read_text() == page, "run the tool"
    for command in commands_page.COMMANDS:
        assert f"\n## d2kd {command.name}\n" in page and f"\nd2kd {command.name}" in page


def test_costs_are_those_of_the_page():
    costs = read_costs(str(ROOT / "docs" / "costs.json"))
    assert len(costs) == len(STANDARD) and costs_markdown(costs) in text("docs/speed.md")

"""Links of the documentation lead somewhere, and the files that it names are there."""

import re

import pytest
from pages import NAMES, ROOT, TODAY, prose

pytestmark = pytest.mark.docs

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
# What stands between backticks and is a path of this repository, <placeholders> and globs included
PATH = re.compile(r"`((?:d2kd|docs|tests|tools|configs)/[^`\s]*)`")


def anchors(page):
    """What the headings of a page are called in links, as GitHub makes it of them."""
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in HEADING.findall(prose(page))]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            there = anchors(path.resolve().relative_to(ROOT))
            assert anchor in there, f"{page} links to {target}, but the headings are {there}"


@pytest.mark.parametrize("page", TODAY)
def test_named_paths_exist(page):
    for name in PATH.findall(prose(page)):
        pattern = re.sub(r"<[^<>]*>|…|\.\.\.", "*", name).rstrip("/")
        assert any(ROOT.glob(pattern)), f"{page} names {name}"


def test_every_page_is_in_the_index():
    linked = {target.split("#")[0] for target in LINK.findall(prose("docs/README.md"))}
    pages = {name[len("docs/") :] for name in NAMES if re.fullmatch(r"docs/[\w-]+\.md", name)}
    assert pages - {"README.md"} <= linked

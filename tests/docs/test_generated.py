"""Pages that follow from the code, or from data beside them, are up to date."""

import sys

import pytest
from detectron2.config import CfgNode, get_cfg
from pages import ROOT, text

from d2kd.benchmark.costs import costs_markdown, read_costs
from d2kd.benchmark.measuring import STANDARD
from d2kd.comparison.cells import Cell, write_cells
from d2kd.config import default_config

sys.path.append(str(ROOT / "tools"))
import commands_page
import configuration_page
import results_page

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
    cfg = default_config()
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


def test_results_are_those_of_the_runs():
    named = set()
    for path in results_page.PAGES:
        page = path.read_text()
        assert results_page.page(page, path.parent) == page, "run the tool"
        named |= {name for _, name, _ in results_page.TABLE.findall(page)}
    assert named == {p.stem for p in results_page.RESULTS.glob("*.json")} - {
        "teachers",
        "step_costs",
    }


def cell(label, seed, ap, **made_with):
    made_with = {"processor": "A", "threads": 1, "torch": "2", "detectron2": "0.6", **made_with}
    aps = {"AP": ap, "AP50": ap, "AP75": ap}
    return Cell(label, "recipe.yaml", [], seed, aps, 1.0, 1.0, {"commit": "01234567", **made_with})


def test_a_table_names_where_its_runs_come_from(monkeypatch, tmp_path):
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    cells = [cell("plain", 1, 10.0), cell("taught", 1, 12.0), cell("plain", 2, 11.0)]
    write_cells(cells, str(tmp_path / "mine.json"))
    page = results_page.page("before\n<!-- table: mine -->\nold\n<!-- end -->\nafter\n", tmp_path)
    assert page.startswith("before\n<!-- table: mine -->\n|") and page.endswith("-->\nafter\n")
    assert "old" not in page and "+2.0" in page and results_page.page(page, tmp_path) == page
    assert "Seeds 1, 2: commit 0123456, A, 1 thread per run" in page


def test_runs_with_one_seed_come_from_one_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    cells = [cell("plain", 1, 10.0), cell("taught", 1, 12.0, commit="76543210")]
    write_cells(cells, str(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match="mine: runs with one seed are of several commits"):
        results_page.section("mine", tmp_path)


def test_another_seed_may_come_from_another_machine():
    later = {"commit": "76543210", "processor": "B"}
    cells = [cell("plain", 1, 10.0), cell("plain", 2, 11.0, **later), cell("x", 2, 9.0, **later)]
    text = results_page.origin("mine", cells)
    assert text.startswith("Seed 1: commit 0123456, A, 1 thread per run, ")
    assert "; seed 2: commit 7654321, B, 1 thread per run, " in text


def test_students_are_drawn_over_their_teachers():
    rows = {
        "plain student": [cell("plain", 1, 5.0)],
        "CrossKD, teacher after 20": [cell("x", 1, 8.0), cell("x", 2, 10.0)],
        "CrossKD, teacher after 10": [cell("x", 1, 6.0), cell("x", 2, 6.0)],
    }
    curves = results_page.curves(rows, {"10": 30.0, "20": 50.0})
    assert curves == {"CrossKD": [(30.0, 6.0, 0.0), (50.0, 9.0, pytest.approx(2**0.5))]}


def entries(page):
    """What stands in the rows of the only table of a page."""
    return [[word.strip() for word in line.split("|")[1:-1]] for line in page.splitlines()[3:-1]]


def test_methods_beside_a_plain_student_that_trains_for_as_long(monkeypatch, tmp_path):
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    longer = [
        ("plain", 10.0, 12.0),
        ("1.5 times as long", 20.0, 22.0),
        ("2 times as long", 24.0, 24.0),
    ]
    methods = [longer[0], ("FRS, published", 23.0, 27.0), ("HGD, default", 30.0, 30.0)]
    for name, rows in (("longer", longer), ("methods", methods)):
        cells = [cell(label, seed, ap) for label, *aps in rows for seed, ap in enumerate(aps)]
        cells += [cell("FRS, share 0.5", 0, 1.0)] * (name == "methods")  # not with all seeds
        write_cells(cells, str(tmp_path / f"{name}_x.json"))
    (tmp_path / "step_costs.json").write_text('{"x": {"FRS": 1.25, "HGD": 2.5}}')
    page = results_page.page("<!-- equal time: x, methods_x -->\nold\n<!-- end -->\n", tmp_path)
    assert entries(page) == [
        ["FRS, published", "1.25", "25.0 ± 2.8", "16.0 ± 1.4", "+9.0 ± 1.4"],
        [
            "HGD, default",
            "2.50",
            "30.0 ± 0.0",
            "> 24.0 ± 0.0",
            "< +6.0 ± 0.0",
        ],  # 2 times is the longest that was tried
    ]
    assert results_page.page(page, tmp_path) == page


@pytest.mark.parametrize("cost, seeds", [(1.25, [4, 1]), (1.75, [1]), (3.0, [4, 1])])
def test_equal_time_needs_a_plain_student_that_trained_for_as_long(cost, seeds):
    plain = {1: ([1.0, 2.0], [10.0, 20.0]), 4: ([1.0, 1.5], [10.0, 15.0])}
    cells = [cell("x", seed, 30.0) for seed in (4, 9, 1)]
    assert [x.seed for x in results_page.comparable(cells, cost, plain)] == seeds
    found = results_page.beside_plain(results_page.comparable(cells, cost, plain), cost, plain)
    assert found.difference.startswith("<") == (cost == 3.0)


def test_matrix_takes_the_rows_on_equal_terms(monkeypatch, tmp_path):
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    first = [("plain", 10.0), ("2 times as long", 20.0), ("FRS, published", 11.0)]
    first += [("FRS, share 8", 12.0), ("PKD, share 8", 13.0)]
    later = [("plain", 10.0), ("FRS, P3 to P7", 15.0), ("FRS, P3 to P5", 14.0)]
    for name, rows in (("first", first), ("later", later), ("longer_x", first[:2])):
        write_cells([cell(label, 1, ap) for label, ap in rows], str(tmp_path / f"{name}.json"))
    (tmp_path / "step_costs.json").write_text('{"x": {"FRS": 1.5, "MGD": 2.0}}')
    monkeypatch.setattr(results_page, "METHODS", ("FRS", "PKD", "MGD"))
    monkeypatch.setattr(results_page, "DETECTORS", {"X": ("x", ("first", "later"))})
    page = "<!-- matrix: {} -->\nold\n<!-- end -->\n"
    gains = results_page.page(page.format("gains"), tmp_path)
    assert entries(gains) == [["X", "10.0", "+4.0", "+3.0", ""]]
    at_equal_time = results_page.page(page.format("equal time"), tmp_path)
    assert entries(at_equal_time) == [["X", "10.0", "-1.0", "", ""]]  # costs of PKD are not known

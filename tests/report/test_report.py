"""The page about runs: what it shows, and what it does where something is missing."""

import json
import os
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from contract.cells import all_cells, build_cell, with_masks
from detectron2.data import DatasetCatalog
from toys import batch

from d2kd.cli.main import main
from d2kd.engine.trained_run import open_run
from d2kd.errors import UserError
from d2kd.report import write_report
from d2kd.report.facts import facts_of
from d2kd.report.gradient_maps import gradient_maps
from d2kd.report.pictures import before_and_after

SECTIONS = ("pair", "ap", "classes", "losses", "detections", "looks", "cost", "config", "versions")


class Page(HTMLParser):
    """What a page consists of: addresses that it loads or links, ids, words."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.ids, self.words, self.pictures = [], [], [], [], []
        with open(path, encoding="utf-8") as f:
            self.source = f.read()
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        if tag == "a":
            self.links.append(values["href"])
        else:
            self.loads += [values[k] for k in ("src", "href", "data", "action") if k in values]
        self.pictures += [values["alt"]] if tag == "img" else []

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page(distilled, plain):
    """The page on the run with FRS against the plain one, by the command."""
    path = os.path.join(distilled.folder, "report.html")
    main(["report", distilled.folder, "--baseline", plain.folder])
    return Page(path)


def test_it_has_its_sections_and_needs_nothing_else(page):
    assert set(SECTIONS) <= set(page.ids)
    assert all(address.startswith("data:") for address in page.loads)
    assert {link.lstrip("#") for link in page.links} == set(SECTIONS)
    assert not re.search(r"<script|@import|url\(", page.source)


def test_it_says_what_was_learned_from_what(page, distilled):
    assert "FRS" in page.text and "loss_frs_feature" in page.text
    assert "teacher.pth, after " in page.text or "teacher.pth, written " in page.text
    assert "the baseline, learned from the ground truth alone" in page.text
    assert (
        "SOLVER: ACCUMULATION_STEPS: 1 AMP:" in page.text
        and "torch" in page.text
        and "commit" in page.text
    )
    assert "model_0000009.pth" in page.text and distilled.folder in page.text


def test_it_shows_curves_detections_and_what_the_method_looked_at(page):
    shown = {"AP over iterations", "losses over iterations", "detections: ground truth"}
    shown |= {"detections: teacher", "loss_frs_feature: p3", "FRS: the teacher's score: p3"}
    assert shown <= set(page.pictures)
    assert page.pictures.count("loss_frs_cls: p3") == 4  # two images, before and after
    assert page.pictures.count("FRS: the teacher's score: p3") == 2  # the teacher stays
    assert re.search(r"The loss on these images: \S+ with model_0000009.pth, \S+ with", page.text)


def test_facts_of_a_run(distilled, plain):
    base, run = facts_of([distilled], plain)
    assert base.is_baseline and not run.is_baseline and base.methods == []
    assert [steps for steps, _ in run.history("bbox/AP")] == [10, 20]
    assert {"circle", "star"} <= set(run.class_ap("bbox"))
    assert run.weight_of("loss_frs_cls") == "distill/frs_cls/weight"
    assert run.weight_of("loss_fcos_cls") is None
    assert run.losses[-2:] == ["loss_frs_cls", "loss_frs_feature"]
    seconds = run.seconds()
    parts = ("data", "teacher", "distillation", "student")
    assert sum(seconds[part] for part in parts) == pytest.approx(seconds["total"])
    assert set(base.seconds()) == {"total", "data", "student"} and run.memory() > 0
    assert run.name != base.name


def test_a_run_that_was_killed_is_not_said_to_be_at_its_end(distilled):
    [run] = facts_of([distilled], None)
    assert run.state("bbox/AP") == ""
    run.lines = [line for line in run.lines if line["iteration"] < 15]
    assert run.state("bbox/AP") == ", after 10 of 20 iterations"
    run.lines = []
    assert run.state("bbox/AP") == ""


def test_evaluations_of_a_run_that_was_scaled_to_fewer_processes(distilled):
    """It took twice as many iterations as its config says."""
    [run] = facts_of([distilled], None)
    solver = run.cfg.SOLVER
    solver.REFERENCE_WORLD_SIZE, solver.IMS_PER_BATCH, solver.MAX_ITER = 2, 2, 10
    assert [steps for steps, _ in run.history("bbox/AP")] == [10, 20]


def test_an_older_page_is_replaced_and_another_file_is_not(
    page, distilled, plain, tmp_path, capsys
):
    path = os.path.join(distilled.folder, "report.html")
    main(["report", distilled.folder])
    assert f"{path}, an older report, is replaced" in capsys.readouterr().out
    other = tmp_path / "notes.html"
    other.write_text("# d2kd report makes it")
    for output, words in (
        (other, "a file that is no report"),
        (tmp_path, "a folder"),
        (tmp_path / "none" / "x.html", "there is no folder"),
    ):
        with pytest.raises(UserError, match=words):
            write_report([plain], None, str(output))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a file that is no report"):
        write_report([plain], None, str(tmp_path / "pipe"))
    assert other.read_text() == "# d2kd report makes it"


def test_two_checkpoints_of_a_run_have_names_of_their_own(distilled):
    older = os.path.join(distilled.folder, "model_0000009.pth")
    names = [f.name for f in facts_of([distilled, open_run(older)], None)]
    assert [name.rsplit(", ", 1)[1] for name in names] == ["model_final.pth", "model_0000009.pth"]


def test_no_gain_over_a_run_on_other_data(distilled, plain, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(plain.folder, folder)
    text = (folder / "config.yaml").read_text().replace("- toy_val", "- toy_train")
    (folder / "config.yaml").write_text(text)
    write_report([distilled], open_run(str(folder)), str(tmp_path / "report.html"))
    assert "on other data" in Page(tmp_path / "report.html").text


def test_what_is_missing_is_said_and_the_rest_is_shown(distilled, tmp_path):
    """A run that came from another machine without its teacher and data, and was killed."""
    folder = tmp_path / "moved"
    shutil.copytree(distilled.folder, folder)
    text = (folder / "config.yaml").read_text()
    text = text.replace("/teacher.pth", "/gone.pth").replace("- toy_val", "- gone_val")
    (folder / "config.yaml").write_text(text)
    (folder / "versions.json").write_text("[")
    lines = (folder / "metrics.json").read_text().splitlines()
    (folder / "metrics.json").write_text("\n".join(lines)[:-20])
    write_report([open_run(str(folder))], None, str(folder / "report.html"))
    page = Page(folder / "report.html")
    assert "which is not here: DISTILL.TEACHER.WEIGHTS is" in page.text
    assert "Not shown: DATASETS.TEST: there is no data set 'gone_val'" in page.text
    assert "The run recorded none." in page.text
    assert "losses over iterations" in page.pictures


def test_data_whose_loader_fails_are_left_out(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: None.images)
    write_report([plain], None, str(tmp_path / "report.html"))
    page = Page(tmp_path / "report.html")
    assert "Not shown: the images of toy_val cannot be had" in page.text
    assert "losses over iterations" in page.pictures


def test_words_of_others_stay_words(plain, tmp_path):
    folder = tmp_path / "<script>x"
    shutil.copytree(plain.folder, folder)
    lines = [json.loads(x) for x in (folder / "metrics.json").read_text().splitlines()]
    lines[-1]["bbox/AP-<b>"] = 1.0
    (folder / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write_report([open_run(str(folder))], None, str(tmp_path / "page.html"))
    page = Page(tmp_path / "page.html")
    assert "<script" not in page.source and "<script>x" in page.text and "<b>" in page.text


METHODS = {cell.method: cell for cell in reversed(all_cells())}


@pytest.mark.parametrize("cell", METHODS.values(), ids=METHODS)
def test_every_loss_pulls_somewhere(cell):
    model = build_cell([cell])
    found = gradient_maps(model, with_masks(batch(((96, 128), (80, 100)))), iteration=1000)
    names = {f"loss_{cell.method}_{term}".lower() for term in cell.terms}
    assert set(found.pulls) == names == set(found.values)
    for maps in [*found.pulls.values(), *found.own.values()]:
        assert maps and set(maps) <= set(found.strides)
        for name, x in maps.items():
            height, width = (-(-side // found.strides[name]) for side in (96, 128))
            assert x.shape == (2, height, width) and torch.isfinite(x).all()
    for x in (x for maps in found.own.values() for x in maps.values()):
        assert x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("method", ["FRS", "DeFeat", "HGD"])
def test_methods_that_weigh_places_show_it(method):
    found = gradient_maps(build_cell([METHODS[method]]), batch(), iteration=1000)
    [(title, maps)] = found.own.items()
    assert title.startswith(f"{method}: ") and any(x.any() for x in maps.values())


def test_a_map_that_stays_is_shown_once():
    same, other = {"p3": torch.zeros(1, 2, 2)}, {"p3": torch.ones(1, 2, 2)}
    found = before_and_after(
        {"a": {"x": same, "y": same}, "b": {"x": same, "y": other}}, lambda x: x
    )
    assert found == {"x": {"": same}, "y": {"a": same, "b": other}}

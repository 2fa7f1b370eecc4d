"""``d2kd compare``: what it reads, the commands that it prints, and what it makes of runs."""

import json
import sys

import pytest

from d2kd.cli.main import main
from d2kd.config import read_config
from d2kd.errors import UserError
from d2kd.evidence import runs
from d2kd.evidence.rows import folder_of, labels_of, read_rows, read_table
from d2kd.evidence.runs import Run, steps_done, train_row
from d2kd.evidence.tables import table

RECIPE = "shapes/frs/fcos_tiny.yaml"
TABLE = """
BASE: "shapes/frs/fcos_tiny.yaml"
PLAIN: "shapes/baselines/fcos_tiny.yaml"
ROWS:
  "features only": {DISTILL.FRS.CLS.WEIGHT: 0.0}
  "P3 alone": {DISTILL.FRS.CLS.LEVEL_WEIGHTS: [1.0, 0.0, 0.0, 0.0, 0.0]}
  "FRS": {}
"""


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """Runs the command on a file with a given content, from its folder."""
    monkeypatch.chdir(tmp_path)

    def run(text, *words):
        (tmp_path / "mine.yaml").write_text(text)
        main(["compare", "mine.yaml", *words])

    return run


def test_rows_of_a_table(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TABLE)
    rows = read_table(str(path))
    assert [row.label for row in rows] == ["plain student", "features only", "P3 alone", "FRS"]
    assert rows[0].config.endswith("configs/shapes/baselines/fcos_tiny.yaml")
    assert all(row.config.endswith(f"configs/{RECIPE}") for row in rows[1:])
    assert rows[1].opts == ["DISTILL.FRS.CLS.WEIGHT", "0.0"] and rows[3].opts == []
    assert folder_of(rows[1]) == "shapes/frs/fcos_tiny/features-only"
    assert read_rows(RECIPE)[0][1:] == rows[3][1:]


def test_commands_of_a_table(compare, capsys):
    compare(TABLE, "--commands", "--seeds", "1", "2", "SOLVER.MAX_ITER", "10")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(x.startswith("d2kd train --config-file shapes/") for x in lines)
    folders = {line.split("OUTPUT_DIR ")[1] for line in lines}
    assert len(folders) == 8 and "output/compare/shapes/frs/fcos_tiny/P3-alone_seed2" in folders
    assert "LEVEL_WEIGHTS '[1.0, 0.0, 0.0, 0.0, 0.0]' SOLVER.MAX_ITER 10 SEED 1 " in lines[4]


def test_rows_of_one_label_are_told_apart():
    rows = read_rows("shapes/defeat/retinanet_tiny_ablation.yaml")
    rows += read_rows("shapes/defeat/faster_rcnn_neck_tiny_ablation.yaml")
    labels = labels_of(rows)
    assert "DeFeat" in labels and "objects only" not in labels
    assert "shapes/defeat/retinanet_tiny/objects-only" in labels


@pytest.mark.parametrize(
    "text, message",
    [
        (f"BASE: {RECIPE}\nROW: {{}}", "no key ROW: did you mean 'ROWS'?"),
        ("ROWS: {a: {}}", "BASE is missing"),
        (f"BASE: {RECIPE}", "ROWS is missing"),
        ("BASE: nowhere.yaml\nROWS: {a: {}}", "BASE is 'nowhere.yaml': no such file"),
        (f"BASE: {RECIPE}\nROWS: {{a: 3}}", "row 'a' is 3: give a mapping"),
        (f"BASE: {RECIPE}\nROWS: {{a: {{", "mine.yaml: while parsing"),
        (f"BASE: {RECIPE}\nROWS: {{a: {{DISTILL.FRS.CLASS: 1}}}}", "row 'a': no config key"),
        (f"BASE: {RECIPE}\nROWS: {{a b: {{SEED: 1}}, a-b: {{SEED: 2}}}}", "one folder"),
    ],
)
def test_bad_tables_are_refused_in_one_line(compare, capsys, text, message):
    with pytest.raises(SystemExit):
        compare(text, "--commands")
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seeds", "1.5"], "--seeds has '1.5': give whole numbers"),
        (["SOLVER.MAX_ITERS", "3"], "no config key SOLVER.MAX_ITERS"),
        (["--seeds", "1", "SOLVER.MAX_ITER"], "give pairs of KEY VALUE"),
    ],
)
def test_bad_words_are_refused_in_one_line(compare, capsys, words, message):
    with pytest.raises(SystemExit):
        compare(TABLE, *words)
    assert message in capsys.readouterr().err


def finished(folder, cfg, ap):
    """A folder as a run leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    results = {"AP": ap, "AP50": ap, "AP75": ap}
    (folder / "summary.json").write_text(json.dumps({"seconds": 2.0, "results": results}))


def test_finished_runs_are_not_repeated(compare, tmp_path, capsys):
    recipes = {RECIPE: 30.0, "shapes/baselines/fcos_tiny.yaml": 20.0}
    for name, ap in recipes.items():
        for seed in (1, 2):
            folder = f"out/{name[: -len('.yaml')]}_seed{seed}"
            cfg = read_config(name, ["SEED", seed, "OUTPUT_DIR", folder])
            finished(tmp_path / folder, cfg, ap + seed)
    text = f"BASE: {RECIPE}\nPLAIN: shapes/baselines/fcos_tiny.yaml\nROWS: {{FRS: {{}}}}"
    compare(text, "--seeds", "1", "2", "--output", "out")
    assert "| +10.0 ± 0.0 " in capsys.readouterr().out
    assert (tmp_path / "out/table.md").read_text().count("\n") == 4
    with pytest.raises(SystemExit):  # other settings, the same folder
        compare(text, "--output", "out", "SOLVER.MAX_ITER", "3")
    assert "holds a run with another config" in capsys.readouterr().err


def test_the_last_line_of_a_run_that_fails_is_its_error(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    fails = "import sys; print('starting'); sys.exit('error: no teacher')"
    monkeypatch.setattr(runs, "_TRAIN", [sys.executable, "-c", fails])
    with pytest.raises(UserError, match="^training shapes/frs/fcos_tiny, seed 1 failed: no teac"):
        train_row(read_rows(RECIPE)[0], 1, "out")
    assert "starting\n" in capsys.readouterr().err


def test_a_line_that_is_being_written_does_not_count(tmp_path):
    assert steps_done(str(tmp_path)) == 0
    (tmp_path / "metrics.json").write_text('{"iteration": 19}\n{"iteration": 39}\n{"iter')
    assert steps_done(str(tmp_path)) == 40


def test_gains_are_those_of_equal_seeds():
    rows = {
        name: [Run("", {"AP": ap, "AP50": ap, "AP75": ap}, 1.0) for ap in aps]
        for name, aps in {"plain": (10.0, 20.0), "taught": (13.0, 23.0)}.items()
    }
    last = table(rows, {"plain": 1.0, "taught": 1.0}, "plain").splitlines()[-1]
    assert "| 18.0 ± 7.1 |" in last and "| +3.0 ± 0.0" in last

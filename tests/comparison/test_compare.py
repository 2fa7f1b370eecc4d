"""``d2kd compare``: what it reads, the commands that it prints, and what it makes of runs."""

import json
import os
import sys

import pytest

from d2kd.cli.main import main
from d2kd.comparison import runs
from d2kd.comparison.cells import Cell, by_label, cell_of, read_cells, write_cells
from d2kd.comparison.rows import Row, check_rows, folder_of, labels_of, read_rows, read_table
from d2kd.comparison.runs import Run, steps_done, train_rows
from d2kd.comparison.tables import table
from d2kd.config import read_config

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


def test_keys_of_a_row_may_be_nested_as_in_a_config(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(
        f"BASE: {RECIPE}\nROWS: {{a: {{SOLVER: {{MAX_ITER: 9, STEPS: [1]}}, VERSION: 2}}}}"
    )
    (row,) = read_table(str(path))
    assert row.opts == ["SOLVER.MAX_ITER", "9", "SOLVER.STEPS", "[1]", "VERSION", "2"]


def test_a_row_may_have_a_base_of_its_own(tmp_path):
    path = tmp_path / "mine.yaml"
    text = (
        f"BASE: {RECIPE}\nROWS: {{long: {{BASE: shapes/baselines/fcos_tiny, SOLVER.MAX_ITER: 9}}}}"
    )
    path.write_text(text)
    (row,) = read_table(str(path))
    assert row.config.endswith("configs/shapes/baselines/fcos_tiny.yaml")
    assert row.opts == ["SOLVER.MAX_ITER", "9"]


def test_a_table_needs_no_base_if_every_row_has_its_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"ROWS: {{a: {{BASE: {RECIPE}}}, b: {{BASE: shapes/baselines/fcos_tiny}}}}")
    assert [os.path.basename(os.path.dirname(row.config)) for row in read_rows(str(path))] == [
        "frs",
        "baselines",
    ]


def test_another_method_in_a_row_brings_its_keys(tmp_path):
    keys = "{DISTILL.METHODS: [PKD], DISTILL.PKD.FEATURE.WEIGHT: 9.0}"
    path = tmp_path / "mine.yaml"
    path.write_text(f"BASE: {RECIPE}\nROWS: {{PKD: {keys}}}")
    check_rows(read_table(str(path)))


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
        (f"BASE: {RECIPE}\nROWS: {{a: {{}}, a: {{SEED: 2}}}}", "'a' stands twice"),
        (f"BASE: {RECIPE}\nROWS: &x {{a: *x}}", "recursion"),
        (f"BASE: {RECIPE}\nROWS: {{a: {{SEED: 2024-13-45}}}}", "month must be"),
        (f"BASE: {RECIPE}\nROWS: {{a: {{", "mine.yaml: while parsing"),
        (f"BASE: {RECIPE}\nROWS: {{a: {{DISTILL.FRS.CLASS: 1}}}}", "row 'a': no config key"),
        (f"BASE: {RECIPE}\nROWS: {{a b: {{VERSION: 1}}, a-b: {{VERSION: 2}}}}", "one folder"),
        (f"BASE: {RECIPE}\nROWS: {{}}", "ROWS is missing"),
        (f"BASE: {RECIPE}\nROWS: {{1.0: {{}}, true: {{}}}}", "row 1.0 has no text for a label"),
        (f"BASE: {RECIPE}\nROWS: {{a: {{SEED: 2}}}}", "row 'a': SEED is given to each run by --s"),
        (f"BASE: {RECIPE}\nROWS: {{a: {{OUTPUT_DIR: x}}}}", "row 'a': OUTPUT_DIR is given to"),
        (
            f"BASE: {RECIPE}\nROWS: {{a: {{DISTILL: {{PKD: {{FEATURE: {{WEIGHT: 9.0}}}}}}}}}}",
            "row 'a': DISTILL.PKD.FEATURE.WEIGHT has no effect, DISTILL.METHODS is ['FRS']: name",
        ),
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
        (["--seeds", "²"], "--seeds has '²': give whole numbers"),
        (["--seeds", "1", "1"], "--seeds has one twice: 1 1"),
        (["SOLVER.MAX_ITERS", "3"], "no config key SOLVER.MAX_ITERS"),
        (["--seeds", "1", "SOLVER.MAX_ITER"], "give pairs of KEY VALUE"),
        (["OUTPUT_DIR", "x"], "command line: OUTPUT_DIR is given to each run by --output"),
        (["DATASETS.TEST", "()"], "row 'plain student': DATASETS.TEST is empty"),
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
    assert (tmp_path / "out/figure.png").stat().st_size > 1000
    cells = read_cells(str(tmp_path / "out/cells.json"))
    assert [(c.label, c.seed, c.results["AP"]) for c in cells] == [
        ("plain student", 1, 21.0),
        ("FRS", 1, 31.0),
        ("plain student", 2, 22.0),
        ("FRS", 2, 32.0),
    ]
    assert cells[1].config == RECIPE and cells[1].seconds == 2.0 and 0.4 < cells[1].parameters < 0.5
    with pytest.raises(SystemExit):  # other settings, the same folder
        compare(text, "--output", "out", "SOLVER.MAX_ITER", "3")
    changed = "holds a run with another config: SOLVER.MAX_ITER was 750, is 3; remove it"
    assert changed in capsys.readouterr().err
    compare(text, "--output", "out", "RUN.KEEP_CHECKPOINTS", "3")  # comes to the same
    with pytest.raises(SystemExit):  # results of another set
        compare(text, "--output", "out", "DATASETS.TEST", "('shapes_tiny_train',)")
    assert "DATASETS.TEST was ['shapes_tiny_val'], is" in capsys.readouterr().err


def line(iteration, ap=None, prefix=""):
    """A line of a run's metrics."""
    metrics = {f"{prefix}bbox/{m}": ap for m in ("AP", "AP50", "AP75")} if ap else {}
    return json.dumps({"iteration": iteration, **metrics}) + "\n"


@pytest.mark.parametrize("sets", [["shapes_tiny_val"], ["shapes_tiny_val", "shapes_tiny_train"]])
def test_a_run_that_was_trained_elsewhere_is_gathered(tmp_path, monkeypatch, sets):
    """By the command that --commands prints, on several GPUs say."""
    monkeypatch.chdir(tmp_path)
    row, opts = read_rows(RECIPE)[0], ["DATASETS.TEST", str(sets)]
    folder = tmp_path / "out/shapes/frs/fcos_tiny_seed1"
    folder.mkdir(parents=True)
    given = ["SEED", 1, "OUTPUT_DIR", str(folder.relative_to(tmp_path))]
    (folder / "config.yaml").write_text(read_config(RECIPE, [*opts, *given]).dump())
    (folder / "model_final.pth").touch()
    prefix = f"{sets[0]}/" if len(sets) > 1 else ""
    ended = line(99, 20.0, prefix) + line(749)  # killed in the last evaluation
    (folder / "metrics.json").write_text(ended)
    assert not runs._Training(row, 1, "out", opts).is_finished()
    (folder / "metrics.json").write_text(ended + line(750, 30.0, prefix))
    (run,) = train_rows([(row, 1)], "out", opts).runs
    assert run.results["AP"] == 30.0 and run.seconds is None


def test_rows_of_python_configs(compare, tmp_path, capsys):
    table = "BASE: shapes/frs/fcos_tiny_lazy.py\nROWS: {short: {SOLVER.MAX_ITER: 3}}"
    compare(table, "--commands", "SOLVER.CHECKPOINT_PERIOD", "2")
    assert "train.max_iter=3 train.checkpointer.period=2" in capsys.readouterr().out
    (row,) = read_table(str(tmp_path / "mine.yaml"))
    made = cell_of("short", row, 1, Run(str(tmp_path), {}, 1.0), ["SOLVER.CHECKPOINT_PERIOD", "2"])
    assert 0.4 < made.parameters < 0.5


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"seconds": 1, "results": {"AP": "x"}}', "5"]
)
def test_a_damaged_summary_is_named(compare, tmp_path, capsys, content):
    folder = f"out/{RECIPE[: -len('.yaml')]}_seed1"
    finished(tmp_path / folder, read_config(RECIPE, ["SEED", 1, "OUTPUT_DIR", folder]), 30.0)
    (tmp_path / folder / "summary.json").write_text(content)
    (tmp_path / folder / "versions.json").write_text('[5, null, ["x"]]')
    with pytest.raises(SystemExit):
        compare(f"BASE: {RECIPE}\nROWS: {{FRS: {{}}}}", "--output", "out")
    assert f"{folder}/summary.json is damaged" in capsys.readouterr().err


def test_apostrophes_in_lists_stay(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(f'BASE: {RECIPE}\nROWS: {{a: {{DATASETS.TRAIN: ["it\'s"]}}}}')
    assert read_table(str(path))[0].opts == ["DATASETS.TRAIN", '["it\'s"]']


@pytest.mark.parametrize(
    "opts, problem",
    [
        ([], "no weights are known for shapes/baselines/gfl_tiny_teacher.yaml: train it first"),
        (["DISTILL.TEACHER.WEIGHTS", "/no.pth"], "DISTILL.TEACHER.WEIGHTS is '/no.pth': no such"),
    ],
)
def test_a_missing_teacher_is_found_before_the_plain_student_is_trained(
    compare, capsys, monkeypatch, opts, problem
):
    monkeypatch.setattr(runs, "_train_all", lambda *_: pytest.fail("it trains"))
    table = "BASE: shapes/ld/gfl_tiny.yaml\nPLAIN: shapes/baselines/gfl_tiny.yaml\nROWS: {LD: {}}"
    compare(table, "--commands", *opts)  # needs no teacher
    with pytest.raises(SystemExit):
        compare(table, *opts)
    error = capsys.readouterr().err
    assert error.startswith("error: row 'LD': ") and problem in error and error.count("\n") == 1


def test_all_missing_teachers_are_named_at_once(compare, capsys):
    rows = "a: {}, b: {SOLVER.MAX_ITER: 9}, c: {DISTILL.TEACHER.WEIGHTS: /no.pth}"
    with pytest.raises(SystemExit):
        compare(f"BASE: shapes/ld/gfl_tiny.yaml\nROWS: {{{rows}}}", "--seeds", "1", "2")
    error = capsys.readouterr().err
    assert error.startswith("error: rows 'a', 'b': DISTILL.TEACHER.WEIGHTS is empty")
    assert "; row 'c': DISTILL.TEACHER.WEIGHTS is '/no.pth'" in error and error.count("\n") == 1


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.01.yaml").write_text(TABLE)
    main(["compare", "lr=0.01.yaml", "--commands", "SOLVER.MAX_ITER", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(" SOLVER.MAX_ITER 10 " in x for x in lines)


def test_the_last_line_of_a_run_that_fails_is_its_error(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    fails = "import sys; print('starting'); sys.exit('error: no teacher')"
    monkeypatch.setattr(runs, "train_command", lambda: [sys.executable, "-c", fails])
    outcome = train_rows([(read_rows(RECIPE)[0], 1)], "out")
    assert outcome.problem() == "1 of 1 runs failed: shapes/frs/fcos_tiny, seed 1: no teacher"
    said = capsys.readouterr().err
    assert "starting\n" in said and "fcos_tiny, seed 1 failed: no teacher\n" in said


def test_a_line_that_is_being_written_does_not_count(tmp_path):
    assert steps_done(str(tmp_path)) == 0
    (tmp_path / "metrics.json").write_text('{"iteration": 19}\n{"iteration": 39}\n{"iter')
    assert steps_done(str(tmp_path)) == 40


def cells_of(label, aps, seconds=1.0):
    """A row's cells, of seeds 1, 2, ..."""
    made_with = {"commit": "0123"}
    return [
        Cell(
            label,
            RECIPE,
            [],
            i + 1,
            dict.fromkeys(("AP", "AP50", "AP75"), ap),
            seconds,
            1.0,
            made_with,
        )
        for i, ap in enumerate(aps)
    ]


def test_gains_are_those_of_equal_seeds():
    rows = by_label([*cells_of("plain", (10.0, 20.0)), *cells_of("taught", (13.0, 23.0))[::-1]])
    last = table(rows, "plain").splitlines()[-1]
    assert "| 18.0 ± 7.1 |" in last and "| +3.0 ± 0.0" in last


def test_gains_are_tested_from_five_seeds_on():
    plain, taught = (1.0, 2.0, 3.0, 4.0, 5.0), (2.0, 4.0, 4.0, 6.0, 6.0)
    rows = by_label([*cells_of("plain", plain), *cells_of("taught", taught)])
    # Differences 1 2 1 2 1: mean 1.4, deviation 0.5477, t = 5.715 with 4 degrees of freedom
    assert "+1.4 ± 0.5, p = 0.005" in table(rows, "plain", costs=False)
    rows = {label: cells[:4] for label, cells in rows.items()}
    assert "p =" not in table(rows, "plain")


def test_rows_of_different_numbers_of_seeds_say_how_many():
    rows = by_label([*cells_of("plain", (10.0, 20.0, 30.0)), *cells_of("taught", (13.0, 23.0))])
    header, _, plain, taught = (
        line.split("|")[2].strip() for line in table(rows, "plain").splitlines()
    )
    assert (header, plain, taught) == ("seeds", "3", "2")
    rows = {label: cells[:2] for label, cells in rows.items()}
    assert "seeds" not in table(rows, "plain")


def test_equal_rows_have_no_p_value():
    rows = by_label([*cells_of("plain", (1.0,) * 5), *cells_of("same", (1.0,) * 5)])
    assert "| +0.0 ± 0.0 " in table(rows, "plain") and "nan" not in table(rows, "plain")


def test_a_run_in_several_parts_has_no_time_and_all_its_commits(tmp_path):
    rows = by_label([*cells_of("plain", [1.0]), *cells_of("parts", [2.0], seconds=None)])
    *_, gained, _, seconds, _ = table(rows, "plain").splitlines()[-1].split("|")
    assert gained.strip() == "+1.0" and not seconds.strip()
    starts = [{"commit": "a", "torch": "2"}, {"commit": "b", "torch": "2"}]
    (tmp_path / "versions.json").write_text(json.dumps(starts))
    run = Run(str(tmp_path), dict.fromkeys(("AP", "AP50", "AP75"), 1.0), None)
    cell = cell_of("x", Row("x", RECIPE, ()), 1, run)
    assert cell.made_with == {"commit": "a, then b", "torch": "2"}


def test_a_detector_that_was_not_trained_has_no_gain():
    rows = {"plain": cells_of("plain", [1.0]), "teacher": cells_of("teacher", [9.0], seconds=0.0)}
    assert "+" not in table(rows, "plain").splitlines()[-1]


def test_cells_are_read_as_they_were_written(tmp_path):
    cells = cells_of("plain", (10.0, 20.0))
    write_cells(cells, str(tmp_path / "new" / "cells.json"))
    assert read_cells(str(tmp_path / "new" / "cells.json")) == cells

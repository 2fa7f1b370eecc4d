"""What a person reads of a run on the console, and what goes to the file alone."""

import logging
import re
import sys

import pytest
from detectron2.utils.events import EventStorage

from d2kd.cli.main import train as main
from d2kd.engine.logs import ConsoleFilter, ConsoleFormatter, PlainFormatter, colours_wanted
from d2kd.engine.progress import ProgressPrinter, split_time
from d2kd.engine.results import best_of, evaluated, history_of
from d2kd.engine.versions import commit_of, recorded_versions


def test_a_page_before_the_first_step_and_what_is_next_at_the_end(tmp_path, capfd, toy_dataset):
    train, val = toy_dataset
    folder = tmp_path / "run"
    opts = ["DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{val}',)"]
    opts += ["SOLVER.MAX_ITER", "21", "SOLVER.IMS_PER_BATCH", "1", "OUTPUT_DIR", str(folder)]
    opts += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "TEST.EVAL_PERIOD", "20"]
    opts += ["INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]
    main(["--config-file", "shapes/frs/fcos_tiny.yaml", *opts])
    shown, log = capfd.readouterr().out, (folder / "log.txt").read_text()
    before, first, _ = re.split(r" iter: (\d+) ", shown, maxsplit=1)
    assert first == "19"
    assert len(before.splitlines()) <= 60
    for words in ("Teacher and student:", "loss_frs_cls", "toy_train: 24 images", str(folder)):
        assert words in before
    for words in ("Environment info", "Running with full config", "Model:", "COCO format"):
        assert words in log and words not in shown
    assert "\x1b" not in shown + log
    line = next(line for line in shown.splitlines() if " iter: 19 " in line)
    for words in ("eta:", "loss:", "frs_feature", "teacher", "distillation", "lr:", "memory:"):
        assert words in line
    end = shown[shown.index("Done, in") :]
    for words in ("model_final.pth", "student.yaml", "log.txt", "bbox/AP", f"d2kd eval {folder}"):
        assert words in end
    [start] = recorded_versions(str(folder))
    assert start["torch"] and start["command"] and start["processes"] == 1


def record(name, level=logging.INFO, message="words", created=100.0):
    made = logging.LogRecord(name, level, "file", 1, message, (), None)
    made.created = created
    return made


def test_what_the_console_shows():
    passes = ConsoleFilter().filter
    assert passes(record("d2kd.engine.trainer"))
    assert not passes(record("detectron2.data.build"))
    assert passes(record("fvcore.common.checkpoint", logging.WARNING))
    assert not passes(record("py.warnings", logging.WARNING))


def test_progress_of_an_evaluation_is_shown_now_and_then():
    passes = ConsoleFilter().filter
    times = (100, 105, 129, 131)
    shown = [
        passes(record("detectron2.evaluation.evaluator", message="Inference done 9/99", created=t))
        for t in times
    ]
    assert shown == [True, False, False, True]


@pytest.mark.parametrize(
    "terminal, variable, wanted",
    [(True, None, True), (False, None, False), (True, "1", False), (True, "", True)],
)
def test_colours(monkeypatch, terminal, variable, wanted):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_COLOR", variable)
    assert colours_wanted() is wanted


def test_colour_codes_of_other_libraries_are_left_out():
    coloured = record("fvcore", logging.WARNING, "\x1b[34mblue\x1b[0m words")
    assert PlainFormatter("%(message)s").format(coloured) == "blue words"
    assert ConsoleFormatter(colour=False).format(coloured).endswith("] WARNING blue words")
    assert "\x1b[31mWARNING\x1b[0m blue" in ConsoleFormatter(colour=True).format(coloured)


def test_the_line_of_a_plain_run_has_no_teacher(caplog):
    with caplog.at_level(logging.INFO, logger="d2kd"), EventStorage(19) as storage:
        storage.put_scalars(total_loss=3.0, loss_cls=1.0, loss_box=2.0, time=0.5, data_time=0.1)
        storage.put_scalar("lr", 0.01, smoothing_hint=False)
        ProgressPrinter(40).write()
        assert storage.latest()["eta_seconds"][0] == pytest.approx(10.0)
    assert caplog.messages == [
        " eta: 0:00:10  iter: 19 of 40  loss: 3  (cls 1, box 2)  "
        "time: 0.500 s (data 0.100, student 0.400)  lr: 0.01"
    ]


def test_the_student_has_the_rest_of_a_step():
    split = split_time(1.0, {"data": 0.1, "teacher": 0.3, "distillation": None})
    assert split == {"data": 0.1, "teacher": 0.3, "student": pytest.approx(0.6)}
    assert split_time(0.1, {"data": 0.2})["student"] == 0.0


def test_results_for_people():
    results = {"bbox": {"AP": 12.345, "AP50": float("nan"), "AP-cat": 1.0, "AP-dog": 20.0}}
    one = evaluated(["val"], results)
    assert one.splitlines()[0] == "bbox on val: AP 12.35  AP50 nan"
    assert re.search(r"AP cat +1.00 +AP dog +20.00", one)
    assert "bbox on b: AP" in evaluated(["a", "b"], {"a": {}, "b": results})


def test_history_counts_the_steps_that_were_done():
    lines = [{"iteration": 9, "bbox/AP": 5.0}, {"iteration": 10}, {"iteration": 20, "bbox/AP": 5.0}]
    history = history_of("bbox/AP", lines, max_iter=20)
    assert history == [(10, 5.0), (20, 5.0)]
    assert best_of(history) == (10, 5.0)
    assert best_of([(1, float("nan"))]) is None


def test_a_folder_that_is_no_checkout_has_no_commit(tmp_path):
    assert commit_of(str(tmp_path)) == ""

"""Which checkpoints stay: the newest by number, the best by a metric."""

import os
from collections import OrderedDict

import pytest
import torch
from runs import run_config, train

from d2kd.checkpoint import newest_checkpoint, read_best, refuse_occupied
from d2kd.checkpoint.resuming import outdated_checkpoints
from d2kd.engine import DistillTrainer
from d2kd.errors import UserError

PERIOD = ["TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 2]


@pytest.fixture
def course(monkeypatch):
    """Lets evaluations find chosen APs by iteration, instead of running them."""

    def choose(*values):
        measured = OrderedDict()

        def test(cls, cfg, model, evaluators=None):
            step = DistillTrainer.running.iter
            measured[step] = values[step] if step < len(values) else 0.0
            return OrderedDict(bbox={"AP": measured[step]})

        def before_train(self):
            DistillTrainer.running = self
            original(self)

        original = DistillTrainer.before_train
        monkeypatch.setattr(DistillTrainer, "running", None, raising=False)
        monkeypatch.setattr(DistillTrainer, "before_train", before_train)
        monkeypatch.setattr(DistillTrainer, "test", classmethod(test))
        return measured

    return choose


def names(cfg):
    return sorted(n for n in os.listdir(cfg.OUTPUT_DIR) if n.endswith(".pth"))


def plain(tmp_path, toy_dataset, *opts, methods=()):
    return run_config(tmp_path / "a", "FCOS", toy_dataset, [*PERIOD, *opts], methods=methods)


def test_the_best_student_is_kept(tmp_path, toy_dataset, course):
    course(1.0, 7.0, 3.0, 7.0, float("nan"), 5.0, 6.0)
    cfg = plain(tmp_path, toy_dataset, methods=["FRS"])
    trainer = train(cfg)
    assert read_best(cfg.OUTPUT_DIR)[:3] == ("bbox/AP", 7.0, 1)
    best = torch.load(f"{cfg.OUTPUT_DIR}/model_best.pth", weights_only=True)
    after_two = torch.load(f"{cfg.OUTPUT_DIR}/model_0000001.pth", weights_only=True)
    assert best["model"].keys() == trainer.student.state_dict().keys()
    assert all(torch.equal(best["model"][k], after_two["model"][k]) for k in best["model"])
    assert {"distillers", "classes"} <= set(best) and not {"trainer", "run_state"} & set(best)
    assert newest_checkpoint(cfg.OUTPUT_DIR).path.endswith("model_final.pth")


def test_of_several_sets_the_first_one_chooses(tmp_path, toy_dataset, monkeypatch):
    cfg = plain(tmp_path, toy_dataset)
    first, second = cfg.DATASETS.TEST[0], cfg.DATASETS.TRAIN[0]
    cfg.DATASETS.TEST = (first, second)
    results = {first: {"bbox": {"AP": 3.0}}, second: {"bbox": {"AP": 9.0}}}
    monkeypatch.setattr(DistillTrainer, "test", classmethod(lambda *_, **__: results))
    train(cfg)
    assert read_best(cfg.OUTPUT_DIR)[:3] == (f"{first}/bbox/AP", 3.0, 0)


def test_the_last_evaluation_counts(tmp_path, toy_dataset, course):
    course(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0)
    cfg = plain(tmp_path, toy_dataset)
    train(cfg)
    assert read_best(cfg.OUTPUT_DIR)[:3] == ("bbox/AP", 9.0, 6)


def test_a_killed_run_does_not_forget_the_best(tmp_path, toy_dataset, course):
    """It was found after the last checkpoint, from which the run goes on."""
    course(1.0, 2.0, 8.0)
    cfg = plain(tmp_path, toy_dataset)
    train(cfg, at=3)
    assert read_best(cfg.OUTPUT_DIR).value == 8.0
    course(1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 7.5)
    assert train(cfg, resume=True).start_iter == 2
    assert read_best(cfg.OUTPUT_DIR)[:3] == ("bbox/AP", 8.0, 2)


def test_another_metric_starts_anew(tmp_path, toy_dataset, course, caplog):
    course(9.0, 9.0, 9.0)
    cfg = plain(tmp_path, toy_dataset)
    train(cfg, at=3)
    cfg.RUN.BEST_METRIC = "bbox/AP50"
    course()
    train(cfg, resume=True)
    assert "was chosen by bbox/AP, RUN.BEST_METRIC is bbox/AP50" in caplog.text
    [line] = [m for m in caplog.messages if "do not measure" in m]
    assert line.endswith("did you mean 'bbox/AP'?")
    assert read_best(cfg.OUTPUT_DIR)[:3] == ("bbox/AP", 9.0, 0)  # AP50 was never measured


def test_another_test_set_starts_anew(tmp_path, toy_dataset, course, caplog):
    course(9.0, 9.0, 9.0)
    cfg = plain(tmp_path, toy_dataset)
    train(cfg, at=3)
    [before] = cfg.DATASETS.TEST
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    course(1.0, 2.0, 3.0, 2.0)
    train(cfg, resume=True)
    assert f"was chosen on {before}, DATASETS.TEST is {cfg.DATASETS.TRAIN[0]}" in caplog.text
    assert read_best(cfg.OUTPUT_DIR) == ("bbox/AP", 3.0, 2, list(cfg.DATASETS.TRAIN))


@pytest.mark.parametrize("opts", [["RUN.BEST_METRIC", ""], ["TEST.EVAL_PERIOD", 0]])
def test_no_best_where_none_is_chosen(tmp_path, toy_dataset, course, opts):
    course(1.0, 2.0, 3.0)
    cfg = plain(tmp_path, toy_dataset, *opts)
    train(cfg)
    assert "model_best.pth" not in names(cfg) and "model_final.pth" in names(cfg)


def test_the_newest_stay(tmp_path, toy_dataset, course):
    course()
    cfg = plain(tmp_path, toy_dataset, "RUN.KEEP_CHECKPOINTS", 2, "RUN.BEST_METRIC", "")
    train(cfg, at=5)
    assert names(cfg) == ["model_0000001.pth", "model_0000003.pth"]
    train(cfg, resume=True)
    assert names(cfg) == ["model_0000003.pth", "model_0000005.pth", "model_final.pth"]
    assert newest_checkpoint(cfg.OUTPUT_DIR).steps == 6


def test_what_is_newer_than_the_last_one_written_is_left_alone(tmp_path):
    for number in (1, 3, 5, 7, 9):
        (tmp_path / f"model_{number:07d}.pth").write_text("")
    (tmp_path / "model_best.pth").write_text("")
    assert outdated_checkpoints(str(tmp_path), "model_0000005.pth", keep=2) == ["model_0000001.pth"]
    assert outdated_checkpoints(str(tmp_path), "model_0000099.pth", keep=1) == []


def test_nothing_is_removed_before_the_next_one_is_whole(
    tmp_path, toy_dataset, course, monkeypatch
):
    course()
    cfg = plain(tmp_path, toy_dataset, "RUN.KEEP_CHECKPOINTS", 1, "RUN.BEST_METRIC", "")

    def full(trainer):
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))

    with pytest.raises(UserError, match="No space"):
        train(cfg, at=3, action=full)
    assert names(cfg) == ["model_0000001.pth"]


def test_the_best_of_another_run_is_not_overwritten(tmp_path):
    (tmp_path / "model_best.pth").write_text("")
    with pytest.raises(UserError, match="holds an unfinished run"):
        refuse_occupied(str(tmp_path))


def test_a_best_file_that_cannot_be_read_counts_as_none(tmp_path):
    assert read_best(str(tmp_path)) is None
    (tmp_path / "model_best.pth").write_text("PK")
    assert read_best(str(tmp_path)) is None

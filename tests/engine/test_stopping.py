"""SIGTERM and Ctrl-C, and that a run which was interrupted anywhere ends as one that was not."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.env import seed_all_rng
from runs import Killed, assert_same_run, metrics, run_config, train
from small_run import start

from d2kd.engine import DistillTrainer
from d2kd.engine.stopping import command_to_resume

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def close_terminal(trainer):
    """The shell and the system say so both."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGHUP)


def send(number):
    return lambda trainer: os.kill(os.getpid(), number)


def checkpoints(cfg):
    return sorted(n for n in os.listdir(cfg.OUTPUT_DIR) if n.endswith(".pth"))


@pytest.fixture
def whole(tmp_path, toy_dataset):
    cfg = run_config(tmp_path / "whole", "FCOS", toy_dataset)
    train(cfg)
    return cfg


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("iteration", [1, 4])
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    tmp_path, toy_dataset, whole, number, iteration, caplog
):
    cfg = run_config(tmp_path / "stopped", "FCOS", toy_dataset)
    with pytest.raises(SystemExit) as stop:
        train(cfg, at=iteration, action=send(number))
    assert stop.value.code == STATUS[number]
    assert f"model_{iteration:07d}.pth" in checkpoints(cfg)
    assert f"Stopped by {signal.Signals(number).name}: {iteration + 1} of 6 steps" in caplog.text
    assert "--resume" in caplog.text and "Traceback" not in caplog.text
    assert train(cfg, resume=True).start_iter == iteration + 1
    assert_same_run(whole, cfg)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_terminal_that_closes_says_so_twice(tmp_path, toy_dataset, caplog):
    cfg = run_config(tmp_path / "stopped", "FCOS", toy_dataset)
    with pytest.raises(SystemExit) as stop:
        train(cfg, at=1, action=close_terminal)
    assert stop.value.code == 129 and "model_0000001.pth" in checkpoints(cfg)


@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_an_evaluation_is_left_and_made_up_for(
    tmp_path, toy_dataset, whole, evaluation, monkeypatch
):
    cfg = run_config(tmp_path / "stopped", "FCOS", toy_dataset)
    done, process = [], COCOEvaluator.process

    def interrupted(self, inputs, outputs):
        done.append(1)
        if len(done) == 6 * evaluation + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        process(self, inputs, outputs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(COCOEvaluator, "process", interrupted)
        train(cfg)
    assert stop.value.code == 143 and len(done) == 6 * evaluation + 3
    train(cfg, resume=True)
    assert_same_run(whole, cfg)


@pytest.mark.parametrize("place", ["save", "evaluate", "write"])
def test_killed_after_the_step(tmp_path, toy_dataset, whole, place, monkeypatch):
    cfg = run_config(tmp_path / "killed", "FCOS", toy_dataset, ["TEST.EVAL_PERIOD", 3])
    other = run_config(tmp_path / "whole3", "FCOS", toy_dataset, ["TEST.EVAL_PERIOD", 3])
    train(other)
    target = {
        "save": "torch.save",
        "evaluate": "detectron2.evaluation.COCOEvaluator.process",
        "write": "detectron2.utils.events.JSONWriter.write",
    }[place]

    def die(*args, **kwargs):
        raise Killed

    seed_all_rng(cfg.SEED)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(target, die)
        begun = DistillTrainer(cfg)
        begun.resume_or_load(resume=False)
        begun.train()
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == {"save": 0, "evaluate": 3, "write": 6}[place]
    assert_same_run(other, cfg)


def test_metrics_of_a_killed_run_have_no_line_twice(tmp_path, toy_dataset):
    opts = ["SOLVER.MAX_ITER", 44, "SOLVER.CHECKPOINT_PERIOD", 15, "TEST.EVAL_PERIOD", 25]
    one = run_config(tmp_path / "a", "FCOS", toy_dataset, opts)
    other = run_config(tmp_path / "b", "FCOS", toy_dataset, opts)
    metrics_file = Path(other.OUTPUT_DIR) / "metrics.json"
    train(one)
    train(other, at=43)
    with open(f"{other.OUTPUT_DIR}/metrics.json", "a") as f:
        f.write('{"iteration": 43, "los')  # torn
    for _ in range(2):
        train(other, resume=True, at=32)
        # The system would have ended it there: what leaving training writes is not written
        lines = metrics_file.read_text().splitlines(keepends=True)
        metrics_file.write_text("".join(x for x in lines if json.loads(x)["iteration"] < 30))
    train(other, resume=True)
    assert [line["iteration"] for line in metrics(one)] == [19, 39, 24, 43, 44]
    assert_same_run(one, other)


def test_the_second_signal_ends_at_once(tmp_path):
    process = start(tmp_path / "data", tmp_path / "run", "SOLVER.MAX_ITER", 100000)
    log = tmp_path / "run" / "log.txt"
    deadline = time.monotonic() + 240
    try:
        while "Starting training" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()  # else it would go on training behind a failed test
    assert process.returncode in (130, 143)
    assert "once more stops at once" in err and "Traceback" not in out + err
    assert not list((tmp_path / "run").glob("*.unfinished"))


def test_the_command_to_go_on_with():
    argv = ("train_net.py", "--config-file", "a b.yaml", "SEED", "1")
    assert command_to_resume(argv) == "python train_net.py --resume --config-file 'a b.yaml' SEED 1"
    assert command_to_resume(("/bin/d2kd", "train", "--resume", "--config-file=a")) == (
        "/bin/d2kd train --resume --config-file=a"
    )
    argv = ("/clone/d2kd/__main__.py", "train", "--config-file", "a")
    assert command_to_resume(argv) == "python -m d2kd train --resume --config-file a"

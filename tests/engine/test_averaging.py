"""The moving average of the student: its values, its file, and that a resumed run has the same."""

import os

import pytest
import torch
from runs import At, assert_same_run, kill, metrics, run_config, saved, train
from toys import config, detector

from d2kd.checkpoint import class_names_in, write_student_yaml
from d2kd.cli.main import main
from d2kd.engine import DistillTrainer
from d2kd.engine.averaging import EMAHook
from d2kd.engine.run_config import write_run_config
from d2kd.errors import UserError

DECAY = 0.75
AVERAGED = ["SOLVER.EMA_DECAY", DECAY]


@pytest.fixture(scope="module")
def made(tmp_path_factory, toy_dataset):
    """A run with an average and the student's state before every step and at the end."""
    folder, states = tmp_path_factory.mktemp("made"), []
    torch.save(
        {"model": detector("shapes/baselines/fcos_tiny.yaml", seed=3).state_dict()},
        folder / "start.pth",
    )
    opts = [*AVERAGED, "MODEL.WEIGHTS", str(folder / "start.pth")]
    cfg = run_config(folder, "FCOS", toy_dataset, opts)
    trainer = train(cfg, at=0, action=lambda t: t.register_hooks([Before(states)]))
    states.append(copied(trainer.student))
    write_run_config(cfg)
    write_student_yaml(cfg)
    return cfg, states


class Before(At):
    """Keeps the student's state before every step. It is registered in the first one."""

    def __init__(self, states):
        self.states = states

    def before_step(self):
        self.states.append(copied(self.trainer.student))


def copied(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def ema(cfg):
    return torch.load(f"{cfg.OUTPUT_DIR}/model_ema.pth", weights_only=True)


def path_of(cfg):
    return os.path.join(cfg.OUTPUT_DIR, "model_ema.pth")


def test_values_are_those_of_a_loop(made):
    cfg, states = made
    start = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"]
    assert len(states) == 7 and all(torch.equal(start[k], v) for k, v in states[0].items())
    average = {k: v.double() for k, v in states[0].items()}
    for state in states[1:]:
        for name, value in state.items():
            counted = not value.is_floating_point()
            decayed = DECAY * average[name] + (1 - DECAY) * value.double()
            average[name] = value.double() if counted else decayed
    found = ema(cfg)["model"]
    assert found.keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
        assert found[name].dtype == states[0][name].dtype
    assert {int(v) for k, v in found.items() if k.endswith("num_batches_tracked")} == {6}
    moved = [k for k in found if not torch.equal(found[k], states[-1][k])]
    assert any("running_mean" in k for k in moved) and any("conv" in k for k in moved)


def test_the_file_is_a_student(made):
    cfg, states = made
    assert set(ema(cfg)) == {"model", "classes", "iteration"} and ema(cfg)["iteration"] == 5
    assert list(class_names_in(path_of(cfg))) == list(
        class_names_in(f"{cfg.OUTPUT_DIR}/model_final.pth")
    )
    detector("shapes/baselines/fcos_tiny.yaml").load_state_dict(ema(cfg)["model"])
    with open(f"{cfg.OUTPUT_DIR}/student.yaml") as f:
        assert "EMA_DECAY" not in f.read()  # which stock Detectron2 lacks


def test_it_is_evaluated_at_the_end_under_its_own_name(made, capsys):
    cfg, _ = made
    last = metrics(cfg)[-1]
    assert last["iteration"] == 6 and {"ema/bbox/AP", "ema/bbox/AP-star", "bbox/AP"} <= set(last)
    assert not any("ema/bbox/AP" in line for line in metrics(cfg)[:-1])
    main(["eval", path_of(cfg), "DATASETS.TEST", "('toy_val',)"])
    out = capsys.readouterr().out
    assert "model_ema.pth, after 6 steps" in out
    assert f"AP {last['ema/bbox/AP']:.2f}" in out


@pytest.mark.parametrize("kind", ["FCOS", "FasterRCNN"])
def test_killed_and_resumed_ends_with_the_same_average(tmp_path, toy_dataset, kind):
    opts = [*AVERAGED, "SOLVER.ACCUMULATION_STEPS", 2]
    whole = run_config(tmp_path / "whole", kind, toy_dataset, opts)
    train(whole)
    cfg = run_config(tmp_path / "killed", kind, toy_dataset, opts)
    train(cfg, at=4)
    assert not os.path.exists(path_of(cfg))
    assert train(cfg, resume=True).start_iter == 3
    assert_same_run(whole, cfg)
    ours, theirs = saved(cfg, "model_ema.pth"), saved(whole, "model_ema.pth")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, ours[k]) for k, v in theirs.items() if torch.is_tensor(v))


def test_a_run_that_was_killed_before_it_writes_it_at_last(tmp_path, toy_dataset, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    cfg = run_config(tmp_path, "FCOS", toy_dataset, AVERAGED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("d2kd.checkpoint.StudentCheckpointer.save_ema", killed)
        train(cfg)
    assert os.path.exists(f"{cfg.OUTPUT_DIR}/model_final.pth") and not os.path.exists(path_of(cfg))
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == 6 and trainer.iter == 6
    assert "ema/bbox/AP" in metrics(cfg)[-1]
    last = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    average = last["trainer"]["hooks"]["EMAHook"]
    assert all(torch.equal(average[k], v) for k, v in ema(cfg)["model"].items())


def test_a_step_that_mixed_precision_skips_does_not_count():
    student = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    hook = EMAHook(student, DECAY, optimizer, checkpointer=None)
    hook.before_train()
    with torch.no_grad():
        student.bias += 4.0
    before = copied(hook.average)
    for gradient, moved in ((float("inf"), 0.0), (0.0, 1.0)):
        scaler.scale(student(torch.ones(1, 2)).sum() * gradient).backward()
        scaler.step(optimizer)
        scaler.update()
        hook.after_step()
        torch.testing.assert_close(hook.average.bias - before["bias"], torch.tensor([moved]))
        optimizer.zero_grad()


@pytest.mark.parametrize("at", [2, 5])
def test_a_run_that_fails_leaves_the_file(tmp_path, toy_dataset, at):
    cfg = run_config(tmp_path, "FCOS", toy_dataset, AVERAGED)
    os.makedirs(cfg.OUTPUT_DIR)
    with open(path_of(cfg), "w") as f:
        f.write("before")
    train(cfg, at=at, action=kill)
    with open(path_of(cfg)) as f:
        assert f.read() == "before"


def test_a_full_disk_leaves_the_file(made, monkeypatch):
    cfg, _ = made
    with open(path_of(cfg), "rb") as f:
        before = f.read()
    trainer = DistillTrainer(cfg)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="model_ema.pth cannot be written: No space left"):
        trainer.checkpointer.save_ema(trainer.student, 5)
    monkeypatch.undo()
    with open(path_of(cfg), "rb") as f:
        assert f.read() == before


def test_without_it_there_is_none(tmp_path, toy_dataset):
    cfg = run_config(tmp_path, "FCOS", toy_dataset)
    train(cfg)
    assert not os.path.exists(path_of(cfg))
    state = torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)
    assert "EMAHook" not in state["trainer"].get("hooks", {})
    assert not any(name.startswith("ema/") for line in metrics(cfg) for name in line)


@pytest.mark.parametrize("value, advice", [(1.0, "give a number below 1"), (-0.5, "0 or more")])
def test_a_wrong_decay_is_refused(value, advice):
    with pytest.raises(UserError, match=f"SOLVER.EMA_DECAY is {value}: .*{advice}"):
        config("shapes/baselines/fcos_tiny.yaml", ["SOLVER.EMA_DECAY", value])


@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_a_step_that_a_fused_optimizer_skips_is_none(overflow):
    """Mixed precision leaves it to such an optimizer what to do where gradients overflow."""
    student = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(student.parameters(), 1.0, fused=True)
    hook = EMAHook(student, DECAY, optimizer, checkpointer=None)
    student(torch.ones(1, 2)).sum().backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(overflow)
    student.weight.data += 5.0  # since an earlier step
    before = copied(hook.average)
    optimizer.step()
    hook.after_step()
    moved = not torch.equal(hook.average.weight, before["weight"])
    assert moved == (overflow == 0)

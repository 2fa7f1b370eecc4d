"""What a run goes on from, what it refuses, and that a refusal leaves everything as it was."""

import os
import shutil

import pytest
import torch
import yaml
from detectron2.utils import comm
from runs import assert_same_run, run_config, train

from d2kd.checkpoint import StudentCheckpointer, newest_checkpoint, write_student_yaml
from d2kd.cli.main import train as main
from d2kd.engine import DistillTrainer, launch
from d2kd.engine.metrics import read_metrics
from d2kd.engine.run_config import differences, refuse_changed, write_run_config
from d2kd.errors import UserError
from d2kd.writing import atomic_write


@pytest.fixture(scope="module")
def made(tmp_path_factory, toy_dataset):
    """A run with checkpoints after 3 and 6 of 7 steps, killed in the last."""
    folder = tmp_path_factory.mktemp("made")
    opts = ["SOLVER.MAX_ITER", 7, "TEST.EVAL_PERIOD", 0]
    cfg = run_config(folder, "FCOS", toy_dataset, opts)
    train(cfg, at=6)
    write_run_config(cfg)
    write_student_yaml(cfg)
    return cfg


@pytest.fixture
def cfg(made, tmp_path):
    """A copy of that run."""
    copy = made.clone()
    copy.OUTPUT_DIR = str(tmp_path / "run")
    shutil.copytree(made.OUTPUT_DIR, copy.OUTPUT_DIR)
    return copy


@pytest.fixture
def command(cfg, tmp_path, capsys):
    """Calls train_net.py on that run with changes; returns what it printed if it failed."""

    def call(*opts, flags=("--resume",)):
        path = tmp_path / "config.yaml"
        path.write_text(cfg.dump())
        try:
            main(["--config-file", str(path), *flags, *map(str, opts)])
        except SystemExit as stop:
            assert stop.code == 1
            [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
            return line
        return None

    return call


def contents(cfg):
    """Every file of a run but its logs."""
    names = [n for n in os.listdir(cfg.OUTPUT_DIR) if n != "log.txt" and "events" not in n]
    paths = [os.path.join(cfg.OUTPUT_DIR, n) for n in sorted(names)]
    return {path: open(path, "rb").read() for path in paths if os.path.isfile(path)}


def path_of(cfg, name):
    return os.path.join(cfg.OUTPUT_DIR, name)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_run_goes_on_whose_method_has_not_begun(tmp_path, toy_dataset, name):
    """The optimizer has no state of its adapters yet when the run is killed."""
    opts = ["DISTILL.FRS.FEATURE.START_ITER", 4, "DISTILL.FRS.CLS.START_ITER", 4]
    opts += ["SOLVER.OPTIMIZER", name, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", ()]
    whole, killed = (
        run_config(tmp_path / x, "FCOS", toy_dataset, opts, methods=["FRS"]) for x in "ab"
    )
    train(whole)
    train(killed, at=3)
    train(killed, resume=True)
    assert_same_run(whole, killed)


def test_the_last_checkpoint_is_the_newest(cfg):
    assert newest_checkpoint(cfg.OUTPUT_DIR) == (path_of(cfg, "model_0000005.pth"), 6, 1)


def halve(path):
    os.truncate(path, os.path.getsize(path) // 2)


def flip(path):
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 3)  # in the data of a tensor
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 0), halve, flip, os.remove])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(cfg, made, damage, caplog):
    damage(path_of(cfg, "model_0000005.pth"))
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 3
    assert "model_0000005.pth" in caplog.text or "does not name a checkpoint" in caplog.text
    whole = made.clone()
    whole.OUTPUT_DIR = cfg.OUTPUT_DIR + "2"
    train(whole)
    assert_same_run(whole, cfg)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00 garbage", b"", b"../../x.pth"])
def test_a_pointer_that_names_nothing(cfg, content, caplog):
    os.remove(path_of(cfg, "last_checkpoint"))
    if content is not None:
        with open(path_of(cfg, "last_checkpoint"), "wb") as f:
            f.write(content)
    assert train(cfg, resume=True, at=6).start_iter == 6
    assert "does not name a checkpoint of this folder" in caplog.text


def test_an_older_checkpoint_can_be_chosen(cfg):
    with open(path_of(cfg, "last_checkpoint"), "w") as f:
        f.write("model_0000002.pth")
    assert newest_checkpoint(cfg.OUTPUT_DIR).steps == 3


def test_no_checkpoint_can_be_read(cfg, command):
    for name in ("model_0000002.pth", "model_0000005.pth"):
        halve(path_of(cfg, name))
    message = command()
    assert "none of its 2 checkpoints can be read (model_0000005.pth: truncated" in message


def test_a_run_of_an_older_version(cfg, command):
    data = torch.load(path_of(cfg, "model_0000005.pth"), weights_only=True)
    del data["trainer"]["parameter_names"]
    torch.save(data, path_of(cfg, "model_0000005.pth"))
    assert "holds a run of an older d2kd" in command()


def test_checkpoints_without_a_pointer_are_a_run(cfg, command):
    os.remove(path_of(cfg, "last_checkpoint"))
    before = contents(cfg)
    assert "holds an unfinished run (model_0000005.pth): add --resume" in command(flags=())
    assert contents(cfg) == before


@pytest.mark.parametrize(
    "opts, words",
    [
        (["SOLVER.BASE_LR", 0.5], "SOLVER.BASE_LR was 0.002, is 0.5"),
        (["SEED", 6], "SEED was 5, is 6"),
        (["DATALOADER.NUM_WORKERS", 3], "DATALOADER.NUM_WORKERS was 0, is 3"),
        (["SOLVER.MAX_ITER", 9], "SOLVER.MAX_ITER was 7, is 9"),
        (["SOLVER.MAX_ITER", 5], "SOLVER.MAX_ITER is 5, but the run in"),
        (["MODEL.BASIC_RESNET.WIDTH", 4], "MODEL.BASIC_RESNET.WIDTH was 8, is 4"),
        (["MODEL.FCOS.NUM_CLASSES", 7], "MODEL.FCOS.NUM_CLASSES was 6, is 7"),
        (["DISTILL.TEACHER.WEIGHTS", "x.pth"], "DISTILL.TEACHER.WEIGHTS was"),
        (["DISTILL.FRS.CLS.WEIGHT", 0.5], "DISTILL.FRS.CLS.WEIGHT was"),
        (["DATASETS.TRAIN", "('toy_val',)"], "DATASETS.TRAIN was ['toy_train'], is ['toy_val']"),
        (["TEST.PRECISE_BN.ENABLED", True], "TEST.PRECISE_BN.ENABLED was False, is True"),
    ],
)
def test_a_change_of_the_result_is_refused_and_nothing_is_written(cfg, command, opts, words):
    before = contents(cfg)
    assert words in command(*opts)
    assert contents(cfg) == before


def test_more_processes_are_a_change(cfg):
    data = torch.load(path_of(cfg, "model_0000005.pth"), weights_only=True)
    data["run_state"]["ranks"] *= 2
    torch.save(data, path_of(cfg, "model_0000005.pth"))
    with pytest.raises(UserError, match="the number of processes was 2, is 1"):
        refuse_changed(cfg, newest_checkpoint(cfg.OUTPUT_DIR), 1)


def test_output_and_evaluation_may_change(cfg, command):
    opts = ["SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 0, "DATASETS.TEST", "()"]
    opts += ["TEST.DETECTIONS_PER_IMAGE", 5, "MODEL.FCOS.SCORE_THRESH_TEST", 0.5, "VIS_PERIOD", 0]
    assert command(*opts) is None
    assert newest_checkpoint(cfg.OUTPUT_DIR).steps == 7


def test_a_change_can_be_insisted_on(cfg, command):
    assert command("SOLVER.MAX_ITER", 8, "SOLVER.BASE_LR", 0.1, flags=("--force-resume",)) is None
    assert newest_checkpoint(cfg.OUTPUT_DIR).steps == 8
    with open(path_of(cfg, "config.yaml")) as f:
        assert "MAX_ITER: 8" in f.read()


def test_what_is_insisted_on_is_in_force(cfg):
    """Learning rates are the config's at this place of its schedule, and so is the decay."""
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 0.02, 0.3
    resumed, fresh = DistillTrainer(cfg), DistillTrainer(cfg)
    resumed.resume_or_load(resume=True)
    for _ in range(resumed.start_iter):
        fresh._trainer.optimizer.step()
        fresh.scheduler.step()
    optimizers = [x._trainer.optimizer for x in (resumed, fresh)]
    ours, theirs = ([{**g, "params": 0} for g in x.param_groups] for x in optimizers)
    assert resumed.start_iter == 6 and ours == theirs
    assert {g["weight_decay"] for g in ours} >= {0.3}
    assert all(len(state) for state in optimizers[0].state.values())


def test_an_optimizer_of_another_kind_cannot_be_insisted_on(cfg, command):
    message = command("SOLVER.OPTIMIZER", "SGD", flags=("--force-resume",))
    assert "had an optimizer of another kind (SOLVER.OPTIMIZER)" in message


def test_machines_that_find_other_checkpoints(cfg, monkeypatch):
    trainer = DistillTrainer(cfg)
    monkeypatch.setattr(comm, "all_gather", lambda value: [value, 0])
    with pytest.raises(UserError, match="not every process finds the same checkpoint"):
        trainer.resume_or_load(resume=True)


def test_insisting_on_another_student_leaves_the_run(cfg, command):
    before = contents(cfg)
    message = command("MODEL.BASIC_RESNET.WIDTH", 4, flags=("--force-resume",))
    assert "it does not fill" in message and contents(cfg) == before


def test_another_teacher_under_the_same_name_is_refused(cfg, command):
    path = cfg.DISTILL.TEACHER.WEIGHTS
    kept = torch.load(path, weights_only=True)
    other = {k: v + 1 if k.endswith("cls_score.bias") else v for k, v in kept["model"].items()}
    before = contents(cfg)
    try:
        torch.save({"model": other}, path)
        assert "had a teacher with the checksum" in command()
    finally:
        torch.save(kept, path)
    assert contents(cfg) == before


def test_evaluating_in_the_folder_of_a_run_leaves_it(cfg, command):
    before = contents(cfg)
    opts = ["SEED", 77, "MODEL.FCOS.SCORE_THRESH_TEST", 0.3]
    assert command(*opts, flags=("--eval-only", "--resume")) is None
    assert "MODEL.WEIGHTS is empty" in command("MODEL.WEIGHTS", "", flags=("--eval-only",))
    assert contents(cfg) == before


def test_a_key_that_is_new_counts_with_its_default(cfg):
    saved = yaml.safe_load(cfg.dump())
    del saved["SOLVER"]["AMP"], saved["RUN"]
    assert differences(saved, cfg) == []
    saved["SOLVER"]["GONE"] = 3
    assert differences(saved, cfg) == ["SOLVER.GONE was 3, is missing"]


def test_described_files_may_move(cfg):
    """What a training set holds is told by its name."""
    saved = yaml.safe_load(cfg.dump())
    saved["DATASETS"]["DESCRIBED"] = [{"name": "a", "json": "b", "images": "elsewhere"}]
    assert differences(saved, cfg) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), atomic_write(str(path)) as f:
        f.write("half of what")
        raise ZeroDivisionError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]
    full = pytest.raises(UserError, match="cannot be written: No space left")
    with full as error, atomic_write(str(path)):
        raise OSError(28, "No space left on device")
    assert "--resume" in str(error.value) and os.listdir(tmp_path) == ["file"]


def test_a_file_is_not_written_through_a_link(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    os.symlink(victim, f"{path}.unfinished")
    with atomic_write(str(path)) as f:
        f.write("new")
    assert victim.read_text() == "mine" and path.read_text() == "new" and not path.is_symlink()


def test_what_is_no_number_in_metrics_is_passed_over(tmp_path):
    (tmp_path / "metrics.json").write_bytes(
        b'{"iteration": 1, "bbox/AP": "x", "time": 2.5, "l": [1]}\n\xff{\n5\n['
        + b"[" * 10**5
        + b'\n{"iteration": "7"}\n{"iteration": 1'
        + b"0" * 400
        + b'}\n{"iteration": 2}\n{"it'
    )
    assert read_metrics(str(tmp_path)) == [{"iteration": 1, "time": 2.5}, {"iteration": 2}]


def test_a_full_disk_is_one_line(cfg, command, monkeypatch):
    before = contents(cfg)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    message = command("SOLVER.CHECKPOINT_PERIOD", 1)
    assert "No space left on device" in message and "MB free" in message
    monkeypatch.undo()
    after = contents(cfg)
    assert {k: v for k, v in after.items() if k.endswith(".pth")} == {
        k: v for k, v in before.items() if k.endswith(".pth")
    }


def test_a_finished_run_is_left_as_it_is(cfg, command, capsys):
    assert command() is None
    before = contents(cfg)
    assert command() is None
    assert contents(cfg) == before
    assert "nothing is left to do" in capsys.readouterr().out


@pytest.mark.parametrize("later", ['"total_loss": 1.0, "rpn/num": 2.0', '"bbox/AP": 3.0'])
def test_a_run_whose_end_is_moved_to_where_it_is_gets_its_last_student(cfg, command, capsys, later):
    """Also if it had gone further, and its metrics tell of that."""
    cfg.SOLVER.MAX_ITER = 40
    with open(path_of(cfg, "metrics.json"), "a") as f:
        f.write(f'{{"iteration": 9, {later}}}\n')
    assert command("SOLVER.MAX_ITER", 6, flags=("--force-resume",)) is None
    assert "nothing is left to do" not in capsys.readouterr().out
    final = torch.load(path_of(cfg, "model_final.pth"), weights_only=True)
    assert final["iteration"] == 5
    assert [x["iteration"] for x in read_metrics(cfg.OUTPUT_DIR) if "bbox/AP" in x] == [6]


def test_a_run_that_ended_meanwhile_is_left(cfg, command, monkeypatch):
    """It held the folder when this command looked for a run there."""
    elsewhere = path_of(cfg, "elsewhere")
    shutil.copytree(cfg.OUTPUT_DIR, elsewhere)
    monkeypatch.setattr(launch, "hold_folder", lambda folder: os.rename(elsewhere, folder))
    assert "holds" in command("OUTPUT_DIR", path_of(cfg, "new"), flags=())


def test_nothing_is_evaluated_after_a_last_step_that_failed(cfg, monkeypatch):
    def full(*_, **__):
        raise UserError("the disk is full")

    evaluations = []
    monkeypatch.setattr(DistillTrainer, "test", lambda *_: evaluations.append(1))
    monkeypatch.setattr(StudentCheckpointer, "save", full)
    with pytest.raises(UserError, match="iteration 6: the disk is full"):
        train(cfg, resume=True)
    assert not evaluations


def tampered(cfg, change):
    """Changes what the newest checkpoint holds, and writes it anew."""
    path = newest_checkpoint(cfg.OUTPUT_DIR).path
    data = torch.load(path, weights_only=True)
    change(data)
    torch.save(data, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["trainer"].update(iteration="5"),
        lambda data: data["trainer"].update(iteration=-100),
        lambda data: data["trainer"].update(iteration=torch.ones(2)),
        lambda data: data.update(run_state=[1]),
        lambda data: data["run_state"].update(ranks=3),
        lambda data: data["run_state"].update(scalars=[]),
    ],
)
def test_a_checkpoint_that_d2kd_has_not_written_so_is_passed_over(cfg, change):
    assert newest_checkpoint(cfg.OUTPUT_DIR).steps == 6
    tampered(cfg, change)
    assert newest_checkpoint(cfg.OUTPUT_DIR).steps == 3


def test_random_states_that_are_none_are_refused(cfg, command):
    tampered(cfg, lambda data: data["run_state"].update(ranks=[{}]))
    before = contents(cfg)
    assert "random states that d2kd does not write (KeyError: 'python')" in command()
    assert contents(cfg) == before

"""Runs whose config is a Python program: equal to those of YAML, resumed exactly, saved whole."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from runs import assert_same_run, train

from d2kd.checkpoint import write_student_program
from d2kd.checkpoint.weights import checksum
from d2kd.cli.main import main
from d2kd.config import default_config, read_config
from d2kd.distillation import build_detector, build_model
from d2kd.engine import DistillTrainer, evaluators
from d2kd.engine.preflight import refuse_no_evaluation, refuse_settings
from d2kd.engine.run_config import write_run_config
from d2kd.engine.trained_run import open_run
from d2kd.errors import UserError
from d2kd.lazy import lazy_config
from d2kd.lazy.places import OWN_DEFAULTS
from d2kd.prediction import Predictor
from d2kd.schema import get_value

FRS, PLAIN = "shapes/frs/fcos_tiny", "shapes/baselines/fcos_tiny"
SHORT = {
    "dataloader.train.dataset.names": "toy_train",
    "dataloader.test.dataset.names": "toy_val",
    "dataloader.train.mapper.augmentations.0.short_edge_length": "[64,80]",
    "dataloader.train.total_batch_size": 2,
    "train.max_iter": 6,
    "train.checkpointer.period": 3,
    "train.eval_period": 0,
    "train.seed": 5,
}


def words(folder, **changes):
    """Changes to a Python config that make a run of six steps."""
    given = {name.replace("__", "."): value for name, value in changes.items()}
    run = {**SHORT, "train.output_dir": folder, **given}
    return [f"{key}={value}" for key, value in run.items()]


def config(folder, name=FRS, **changes):
    return read_config(f"{name}_lazy.py", words(folder, **changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory, toy_dataset):
    """A run of six steps and one of them that was killed in its fifth step."""
    cfg = config(tmp_path_factory.mktemp("lazy") / "whole")
    trainer = train(cfg)
    write_run_config(cfg)
    write_student_program(cfg)
    return cfg, trainer


def test_killed_and_resumed_ends_as_one_that_was_not(made, tmp_path):
    whole, _ = made
    cfg = config(tmp_path / "run")
    train(cfg, at=4)
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 3
    assert_same_run(whole, cfg)


def test_batches_of_a_step_and_average_stand_below_train(tmp_path):
    cfg = config(tmp_path, train__accumulation_steps=2, train__ema_decay=0.9)
    assert (cfg.SOLVER.ACCUMULATION_STEPS, cfg.SOLVER.EMA_DECAY) == (2, 0.9)
    written = lazy_config(cfg).train
    assert (written.accumulation_steps, written.ema_decay) == (2, 0.9)
    assert "accumulation_steps" not in lazy_config(config(tmp_path)).train
    with pytest.raises(UserError, match="train.ema_decay is 1.0: give a number below 1"):
        config(tmp_path, train__ema_decay=1.0)


def test_detectron2s_own_fcos_is_not_trained_in_mixed_precision(tmp_path):
    cfg = config(tmp_path, train__amp__enabled=True)
    with pytest.raises(UserError, match="the box loss of detectron2.*take d2kd.modeling.meta_arch"):
        refuse_settings(cfg)
    ours = {"model._target_": "d2kd.modeling.meta_arch.FCOS"}
    cfg = config(tmp_path, train__amp__enabled=True, **ours)
    with pytest.raises(UserError, match="mixed precision needs a CUDA device"):  # nothing else
        refuse_settings(cfg)


def test_defaults_are_those_of_the_keys():
    defaults = default_config()
    assert all(get_value(defaults, key) == value for key, value in OWN_DEFAULTS.items())


def test_with_several_batches_and_an_average_it_resumes_exactly(tmp_path, toy_dataset):
    two = {"train__accumulation_steps": 2, "train__ema_decay": 0.5}
    whole, cfg = config(tmp_path / "whole", **two), config(tmp_path / "run", **two)
    train(whole)
    train(cfg, at=4)
    assert train(cfg, resume=True).start_iter == 3
    assert_same_run(whole, cfg)
    ours, theirs = (torch.load(f"{c.OUTPUT_DIR}/model_ema.pth")["model"] for c in (whole, cfg))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("name", [FRS, PLAIN])
def test_first_step_is_that_of_the_same_student_in_yaml(name, tmp_path, toy_dataset):
    opts = ["DATASETS.TRAIN", ("toy_train",), "INPUT.MIN_SIZE_TRAIN", (64, 80), "SEED", 5]
    opts += ["SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", 0]
    seen = []
    for cfg in (read_config(f"{name}.yaml", opts), config(tmp_path, name)):
        seed_all_rng(5)
        trainer = DistillTrainer(cfg)
        groups = [{**g, "params": len(g["params"])} for g in trainer.optimizer.param_groups]
        # Detectron2's main branch orders the images of the two kinds of configs differently
        batch = seen[0][2] if seen else next(iter(trainer.data_loader))
        with EventStorage(50), torch.jit.optimized_execution(False):
            losses = trainer.model(batch)
        seen.append(({k: v.item() for k, v in losses.items()}, groups, batch))
    assert seen[0][:2] == seen[1][:2]
    assert len(seen[0][0]) == (5 if name == FRS else 3) and all(seen[0][0].values())


def test_kd_off_run_is_a_plain_run(tmp_path, toy_dataset):
    off = {"distill__FRS__FEATURE__WEIGHT": 0.0, "distill__FRS__CLS__WEIGHT": 0.0}
    short = {"train__max_iter": 2, "dataloader__test__dataset__names": "[]"}
    runs = [
        train(config(tmp_path / str(i), name, **short, **changes))
        for i, (name, changes) in enumerate([(FRS, off), (PLAIN, {})])
    ]
    assert checksum(runs[0].student) == checksum(runs[1].student)


def test_the_newest_checkpoints_are_kept(tmp_path, toy_dataset):
    kept = {"train__checkpointer__period": 1, "train__checkpointer__max_to_keep": 2}
    none = {"dataloader__test__dataset__names": "[]", "train__max_iter": 3}
    train(config(tmp_path, PLAIN, **kept, **none))
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000001.pth", "model_0000002.pth", "model_final.pth"]


def test_how_many_are_kept_can_be_changed_where_it_was_said(tmp_path, toy_dataset):
    key = "train__checkpointer__max_to_keep"
    write_run_config(config(tmp_path, PLAIN, **{key: 3}))
    for value, kept in ((10, 10), ("null", 0)):
        cfg = read_config(f"{tmp_path}/config.py", words(tmp_path, **{key: value}))
        assert kept == cfg.RUN.KEEP_CHECKPOINTS
    with pytest.raises(UserError, match="train.checkpointer.max_to_keep is -1: give 0 or more"):
        config(tmp_path, PLAIN, **{key: -1})


def test_the_format_of_masks_is_that_of_the_mapper(tmp_path, toy_dataset):
    key = "dataloader__train__mapper__instance_mask_format"
    assert config(tmp_path, PLAIN, **{key: "bitmask"}).INPUT.MASK_FORMAT == "bitmask"


def test_the_program_evaluates_its_run(made, tmp_path, capsys):
    cfg, trainer = made
    folder = str(tmp_path / "moved")
    shutil.copytree(cfg.OUTPUT_DIR, folder)
    os.remove(f"{folder}/metrics.json")
    main(["eval", folder])
    assert os.path.exists(f"{folder}/inference/coco_instances_results.json")
    student = open_run(folder).student("cpu")
    assert checksum(student) == checksum(trainer.student) and not student.training
    assert open_run(folder).student_config(["DATASETS.TEST", ()]).DATASETS.TEST == ()


PLAIN_DETECTRON2 = """
import sys, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
config = LazyConfig.load(sys.argv[1])
model = instantiate(config.model).eval()
left = DetectionCheckpointer(model).load(config.train.init_checkpoint)
instances = model([{"image": torch.zeros(3, 64, 64)}])[0]["instances"]
assert "d2kd" not in sys.modules and "distill" not in config
print(instances.pred_boxes.tensor.shape[1])
print(sum(p.double().sum().item() for p in model.parameters()))
"""


def test_plain_detectron2_opens_the_student(made, tmp_path):
    cfg, trainer = made
    folder = shutil.copytree(cfg.OUTPUT_DIR, tmp_path / "moved")
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_DETECTRON2, str(folder / "student.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = sum(p.double().sum().item() for p in trainer.student.parameters())
    assert result.stdout.split() == ["4", str(expected)]
    assert "not found" not in result.stderr and "not in the model" not in result.stderr.lower()


def refused(folder, capsys, *flags, **changes):
    """The one line in which ``d2kd train`` refuses a run."""
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config-file", f"{FRS}_lazy.py", *flags, *words(folder, **changes)])
    assert stop.value.code == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_a_change_of_the_result_is_refused_when_resuming(made, capsys):
    cfg, _ = made
    changes = {"optimizer__lr": 0.5, "distill__FRS__CLS__WEIGHT": 0.25, "model__head__norm": "BN"}
    line = refused(cfg.OUTPUT_DIR, capsys, "--resume", **changes)
    assert "train.output_dir" in line and "optimizer.lr was 0.002, is 0.5" in line
    assert "distill.FRS.CLS.WEIGHT was 0.05, is 0.25" in line
    assert "model.head.norm was 'GN', is 'BN'" in line and "SOLVER" not in line
    line = refused(cfg.OUTPUT_DIR, capsys, "--resume", train__max_iter=2)
    assert "train.max_iter is 2, but the run in" in line


def test_images_are_resized_as_the_test_mapper_does(made, tmp_path):
    """In prediction, measurements, export and the report, which read it like a YAML's."""
    cfg, _ = made
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (128, 128)
    student = open_run(cfg.OUTPUT_DIR).student_config(["MODEL.DEVICE", "cpu"])
    entry = Predictor(build_detector(student).eval(), student).network_input(
        np.zeros((64, 64, 3), dtype=np.uint8)
    )
    assert entry["image"].shape == (3, 128, 128)
    other = "dataloader.test.mapper.augmentations.0.short_edge_length"
    assert config(tmp_path, **{other.replace(".", "__"): 96}).INPUT.MIN_SIZE_TEST == 96


def test_evaluation_and_output_may_change(made, tmp_path, capsys):
    folder = str(tmp_path / "run")
    shutil.copytree(made[0].OUTPUT_DIR, folder)
    free = ["train.checkpointer.period=2", "model.test_score_thresh=0.5", "run.TIMEOUT=60"]
    command = ["train", "--config-file", f"{FRS}_lazy.py", "--resume", *words(folder), *free]
    main(command)
    assert "All 6 steps are done" in capsys.readouterr().out


def test_what_is_wrong_in_a_run_is_one_line(tmp_path, capsys):
    line = refused(tmp_path, capsys, train__device="cuda:7")
    assert "add 'train.device=cpu' at the end" in line
    line = refused(tmp_path, capsys, dataloader__train__dataset__names="toy_trian")
    assert "dataloader.train.dataset.names: there is no data set 'toy_trian'" in line
    line = refused(tmp_path, capsys, dataloader__train___target_="builtins.dict")
    assert "dataloader.train calls builtins.dict" in line
    line = refused(tmp_path, capsys, optimizer__speed=3)
    assert "optimizer cannot be built: TypeError" in line


def test_own_data_name_the_data_sets_and_the_classes(tmp_path, toy_dataset):
    annotations = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 64}],
        "categories": [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}],
        "annotations": [],
    }
    path = tmp_path / "own.json"
    path.write_text(json.dumps(annotations))
    entry = f'[{{json:"{path}",images:"{tmp_path}"}}]'
    cfg = config(tmp_path, PLAIN, dataloader__train__dataset__names=entry)
    assert build_model(cfg).num_classes == 2
    [name] = cfg.DATASETS.TRAIN
    assert name.startswith("own_") and cfg.DATASETS.DESCRIBED[0]["classes"] == ["bolt", "nut"]
    write_run_config(cfg)
    again = read_config(str(tmp_path / "config.py"))
    assert again.DATASETS == cfg.DATASETS and again.DISTILL == cfg.DISTILL


def test_it_brings_the_evaluator_of_any_kind_of_data(tmp_path, toy_dataset, monkeypatch):
    monkeypatch.setattr(evaluators, "EVALUATORS", {})
    refuse_no_evaluation(config(tmp_path))
    sets = ["DATASETS.TRAIN", toy_dataset[:1], "DATASETS.TEST", toy_dataset[1:]]
    with pytest.raises(UserError, match="'toy_val', whose evaluator_type is 'coco'"):
        refuse_no_evaluation(read_config(PLAIN, sets))


def groups_by_name(model, base_lr, weight_decay_norm):
    """Half the learning rate for what begins with "backbone", as rules of ViTDet go by names."""
    named = model.named_parameters()
    return [{"params": [p], "lr": base_lr / (1 + n.startswith("backbone."))} for n, p in named]


def test_learning_rates_go_by_the_names_of_plain_training(tmp_path, toy_dataset):
    cfg = config(tmp_path, optimizer__params___target_=f"{__name__}.groups_by_name")
    model = DistillTrainer.build_model(cfg)
    optimizer = DistillTrainer.build_optimizer(cfg, model)
    slow, fast = sorted(optimizer.param_groups, key=lambda group: group["lr"])
    assert (slow["lr"], fast["lr"]) == (0.001, 0.002)
    assert len(slow["params"]) == len(list(model.student.backbone.parameters()))
    assert len(fast["params"]) == len(list(model.parameters())) - len(slow["params"])

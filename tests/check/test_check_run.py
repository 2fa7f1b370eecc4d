"""What ``d2kd check`` finds, and that it leaves nothing behind."""

import os

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from toys import distill_config

from d2kd.check import TeacherAP, check_run, check_without_data
from d2kd.check import run as checks
from d2kd.cli.main import main
from d2kd.data.findings import ERROR
from d2kd.distillation import build_detector
from d2kd.pairing import make_plan


@pytest.fixture
def cfg(tmp_path, toy_dataset):
    train, val = toy_dataset
    opts = ["DATASETS.TRAIN", (train,), "DATASETS.TEST", (val,), "INPUT.MIN_SIZE_TRAIN", (64, 80)]
    opts += ["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0]
    return distill_config(tmp_path, "FCOS", opts)


def parts_of(cfg, **options):
    return {part.name: part for part in check_run(cfg, debug=True, **options)}


def errors(parts):
    return [f.message for p in parts.values() for f in p.findings if f.severity == ERROR]


def test_a_good_run_has_no_findings_and_leaves_nothing(cfg, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    parts = parts_of(cfg, num_gpus=2)
    assert not errors(parts)
    assert sorted(tmp_path.rglob("*")) == before and not os.path.exists(cfg.OUTPUT_DIR)
    assert [*parts] == [
        "config",
        "output",
        "DATASETS.TRAIN: toy_train",
        "DATASETS.TEST: toy_val",
        "evaluation",
        "model, on its data",
    ]
    assert "AP of 100.0" in parts["evaluation"].lines[0]
    text = "\n".join(parts["model, on its data"].lines)
    assert "architecture " in text and "loss_frs_cls" in text and "s a step with 1 images" in text
    assert (
        "24 images, 50 boxes, 6 classes; all of its images looked at"
        in parts["DATASETS.TRAIN: toy_train"].lines[0]
    )


def test_every_part_is_tried(cfg):
    annotations = DatasetCatalog.get("toy_val")
    annotations[0]["annotations"][0]["bbox"] = [1, 2, 3]
    DatasetCatalog.register("check_broken", lambda: annotations)
    MetadataCatalog.get("check_broken").set(evaluator_type="coco", thing_classes=["a"] * 6)
    try:
        cfg.DATASETS.TEST = ("check_broken",)
        os.makedirs(cfg.OUTPUT_DIR)
        torch.save({}, os.path.join(cfg.OUTPUT_DIR, "model_final.pth"))
        parts = parts_of(cfg, images=False)
    finally:
        DatasetCatalog.remove("check_broken")
        MetadataCatalog.remove("check_broken")
    assert [*parts][-1] == "model, on images of noise"
    assert any("holds a finished run" in message for message in errors(parts))
    assert any("'bbox' is [1, 2, 3]" in message for message in errors(parts))
    assert len(errors(parts)) == 2
    assert "images not opened" in parts["DATASETS.TRAIN: toy_train"].lines[0]


def test_a_teacher_that_is_not_there(cfg):
    cfg.DISTILL.TEACHER.WEIGHTS = "nowhere.pth"
    [message] = errors(parts_of(cfg, images=False))
    assert "nowhere.pth" in message
    assert not errors({p.name: p for p in check_without_data(cfg, debug=True)})


@pytest.mark.parametrize("expected, as_expected", [(0.0, True), (50.0, False)])
def test_the_teachers_ap(cfg, expected, as_expected):
    parts = parts_of(cfg, images=False, teacher_ap=TeacherAP(expected, 3, 5.0))
    if as_expected:
        assert "on 3 images of toy_val" in parts["teacher"].lines[-1]
    else:
        [message] = errors(parts)
        assert "expected 50 +- 5: are these its weights" in message


def test_the_command_ends_with_a_count_and_what_is_next(cfg, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    main(["check", "--config-file", str(path), "--config-only", "SEED", "3"])
    out = capsys.readouterr().out
    assert "found 0 errors, 0 warnings" in out
    assert out.endswith(f"next: d2kd train --config-file {path} SEED 3\n")
    with pytest.raises(SystemExit) as stop:
        main(["check", "--config-file", str(path), "--config-only", "SOLVER.MAX_ITER", "0"])
    assert stop.value.code == 1 and "SOLVER.MAX_ITER is 0" in capsys.readouterr().out


def test_a_name_that_is_wrong_is_told_once(cfg):
    cfg.DISTILL.METHODS = ["FRSS"]
    for parts in (check_without_data(cfg), check_run(cfg, images=False)):
        [message] = errors({part.name: part for part in parts})
        assert message.startswith("DISTILL.METHODS names 'FRSS': did you mean 'FRS'?")


def test_a_teacher_without_weights_is_not_said_to_have_a_file(cfg):
    lines = [line for part in check_without_data(cfg, debug=True) for line in part.lines]
    assert "The teacher's weights: random, for this check alone" in lines
    assert not any("d2kd_check_" in line for line in lines)


def test_what_the_run_may_skip_is_a_warning(cfg, tmp_path):
    dicts = [dict(d) for d in DatasetCatalog.get("toy_train")]
    dicts[3]["file_name"] = str(tmp_path / "lost.jpg")
    DatasetCatalog.register("check_lost", lambda: dicts)
    MetadataCatalog.get("check_lost").set(
        thing_classes=MetadataCatalog.get("toy_val").thing_classes
    )
    cfg.DATASETS.TRAIN = ("check_lost",)
    try:
        [lost] = errors(parts_of(cfg))
        cfg.RUN.SKIP_BAD_IMAGES = 1
        part = parts_of(cfg)["DATASETS.TRAIN: check_lost"]
    finally:
        DatasetCatalog.remove("check_lost")
        MetadataCatalog.remove("check_lost")
    assert lost == "does not exist" and [f.severity for f in part.findings] == ["warning"]


def test_a_recipe_for_more_gpus_is_scaled_as_training_scales_it(cfg):
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.MAX_ITER = 2, 10
    lines = parts_of(cfg, images=False)["model, on its data"].lines
    assert any("a step with 1 images" in x and "for 20 steps" in x for x in lines)


def test_the_moving_average_is_part_of_the_memory(cfg):
    def memory():
        [line] = [x for x in parts_of(cfg, images=False)["model, on its data"].lines if "MiB" in x]
        return int(line.split()[1])

    # Wide enough that the student is more than the MiB to which memory is rounded
    cfg.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 160])
    plain = memory()
    cfg.SOLVER.EMA_DECAY = 0.9
    parameters = sum(p.numel() for p in build_detector(cfg).parameters())
    assert memory() - plain == pytest.approx(parameters * 4 / 2**20, abs=1.1)


def test_a_batch_that_cannot_be_shared(cfg):
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 3
    assert any("SOLVER.REFERENCE_WORLD_SIZE is 3" in message for message in errors(parts_of(cfg)))
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    [message] = errors(parts_of(cfg, images=False, num_gpus=4))
    assert "a positive multiple of the number of processes, 4" in message
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 2  # on 4 processes it has twice as many images
    assert not errors(parts_of(cfg, images=False, num_gpus=4))


def test_more_objects_than_coco_counts_are_no_error(cfg, monkeypatch):
    monkeypatch.setattr(checks, "ap_of_annotations", lambda *_: 66.3)
    monkeypatch.setattr(checks, "_most_objects", lambda name: 150)
    parts = parts_of(cfg, images=False)
    [said] = parts["evaluation"].findings
    assert not errors(parts) and said.severity == "warning"
    assert "has 150 objects" in said.message and "no detector can exceed 66.3" in said.message


TINY = "shapes/baselines/fcos_tiny"
NAMES = ["--student", TINY, "--teacher", f"{TINY}_teacher"]


def test_what_two_names_amount_to_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["check", *NAMES, "--method", "PKD", "--config-only", "SEED", "3"])
    out = capsys.readouterr().out
    assert "method   PKD: as asked" in out and "found 0 errors" in out
    names = f"--student {TINY} --teacher {TINY}_teacher --method PKD"
    assert out.endswith(f"next: d2kd train {names} SEED 3\n")
    assert not any(tmp_path.iterdir())


def test_a_teacher_that_learns_first_is_checked_as_well(tmp_path, monkeypatch, toy_dataset, capsys):
    """Two classes of one's own: the teacher with the data, the student with a teacher of them."""
    monkeypatch.chdir(tmp_path)
    annotations, images = (
        getattr(MetadataCatalog.get(toy_dataset[0]), key) for key in ("json_file", "image_root")
    )
    data = [f"--{split}-{x}" for split in ("train", "val") for x in ("json", "images")]
    words = [word for pair in zip(data, 2 * [annotations, images]) for word in pair]
    small = ["SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    main(["check", *NAMES, "--finetune-teacher", *words, *small])
    out = capsys.readouterr().out
    first, second = out[out.index("step 1") :].split("step 2, the student")
    assert "evaluation" in first and "s a step with 2 images" in first
    assert "with a teacher of random weights" in second and "found 0 errors" in second
    assert "--finetune-teacher --train-json" in second
    assert not any(tmp_path.iterdir())


def test_a_teacher_that_has_learnt_is_checked_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*NAMES, "--finetune-teacher", "OUTPUT_DIR", "mine"]
    plan = make_plan(TINY, f"{TINY}_teacher", [], ["OUTPUT_DIR", "mine"], finetune=True)
    plan.write_teacher()
    (tmp_path / "mine/teacher/model_final.pth").touch()
    main(["check", "--config-only", *words])
    out = capsys.readouterr().out
    assert "step 1" not in out and "found 0 errors" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_python_config_is_told_in_its_own_words(capsys):
    recipe = "shapes/frs/fcos_tiny_lazy.py"
    with pytest.raises(SystemExit):
        main(["check", "--config-only", "--config-file", recipe, "train.device=cuda"])
    assert "add 'train.device=cpu' at the end" in capsys.readouterr().out

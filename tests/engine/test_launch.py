"""The command line: what it does, and the one line that bad input gets."""

import pytest
import torch
from toys import detector

from d2kd.cli.main import train as main
from d2kd.engine import launch

FCOS = "shapes/baselines/fcos_tiny.yaml"
FRS = "shapes/frs/fcos_tiny.yaml"


@pytest.fixture
def run(tmp_path, capsys, toy_dataset):
    """Calls train_net.py on a small run; returns what it printed to stderr if it failed."""

    def call(config, *opts, flags=()):
        train, val = toy_dataset
        short = ["DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{val}',)"]
        short += ["SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2"]
        short += ["OUTPUT_DIR", str(tmp_path / "run")]
        try:
            main(["--config-file", config, *flags, *short, *map(str, opts)])
        except SystemExit as stop:
            assert stop.code == 1
            errors = capsys.readouterr().err.strip().splitlines()
            return [line for line in errors if line.startswith("error: ")][0]
        return None

    return call


def test_trains_evaluates_and_refuses_to_overwrite(run, tmp_path):
    assert run(FRS) is None
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model_final.pth", "student.yaml", "config.yaml", "metrics.json", "log.txt"} <= files
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Teacher and student:" in log and "loss_frs_feature" in log
    assert "Teacher: all 1,598,699 parameters from d2kd://fcos_tiny_teacher.pth" in log
    before = (tmp_path / "run" / "model_final.pth").read_bytes()
    assert "holds a finished run" in run(FRS)
    assert (tmp_path / "run" / "model_final.pth").read_bytes() == before
    weights = tmp_path / "run" / "model_final.pth"
    assert run(FCOS, "MODEL.WEIGHTS", weights, flags=["--eval-only"]) is None
    assert run(FRS, flags=["--resume"]) is None


def test_a_plain_detector_of_a_kind_that_nothing_reads_is_trained(run, tmp_path):
    file = tmp_path / "proposals.yaml"
    base = "_BASE_: shapes/baselines/faster_rcnn_tiny.yaml\n"
    file.write_text(base + "MODEL: {META_ARCHITECTURE: ProposalNetwork}\n")
    assert run(str(file), "DATASETS.TEST", "()") is None
    assert "ProposalNetwork" in (tmp_path / "run" / "log.txt").read_text()


def test_missing_weights_are_told_before_anything_is_built(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(launch, "run", None)
        patch.setattr(launch, "refuse_unusable", None)
        patch.setattr(launch, "refuse_not_evaluated", None)
        for flags in ([], ["--eval-only"]):
            message = run(FRS, "MODEL.WEIGHTS", "/no.pth", flags=flags)
            assert "MODEL.WEIGHTS is '/no.pth': no such file" in message
    torch.save({"model": detector(FCOS).state_dict()}, tmp_path / "start.pth")
    assert run(FRS, "MODEL.WEIGHTS", tmp_path / "start.pth") is None
    (tmp_path / "start.pth").unlink()  # a run that goes on does not read it
    assert run(FRS, "MODEL.WEIGHTS", tmp_path / "start.pth", flags=["--resume"]) is None


def test_evaluation_needs_every_weight(run, tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    message = run(FCOS, "MODEL.WEIGHTS", tmp_path / "other.pth", flags=["--eval-only"])
    assert "MODEL.WEIGHTS" in message and "does not fill" in message


@pytest.mark.parametrize(
    "opts, expected",
    [
        (["DISTILL.METHDOS", "['FRS']"], "DISTILL.METHDOS: did you mean 'DISTILL.METHODS'?"),
        (["DISTILL.METHODS", "['FSR']"], "DISTILL.METHODS names 'FSR': did you mean 'FRS'?"),
        (["MODEL.META_ARCHITECTURE", "FCSO"], "is 'FCSO': did you mean 'FCOS'?"),
        (["MODEL.BACKBONE.NAME", "nothing"], "'nothing', unknown in the BACKBONE registry"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER"], "give pairs of KEY VALUE"),
        (["SOLVER.OPTIMIZER", "Adam"], "SOLVER.OPTIMIZER is 'Adam': did you mean 'AdamW'?"),
        (["DATASETS.TRAIN", "('toy_trian',)"], "did you mean 'toy_train'?"),
        (
            ["DISTILL.METHODS", "[]", "MODEL.FCOS.NUM_CLASSES", 5],
            "has 6 classes, but the student predicts 5",
        ),
        (["MODEL.WEIGHTS", "/nowhere.pth"], "MODEL.WEIGHTS is '/nowhere.pth'"),
        (["MODEL.WEIGHTS", "/tmp"], "'/tmp': is a folder: give a file in it, such as /tmp/model_"),
        (["DISTILL.TEACHER.CONFIG", ""], "DISTILL.TEACHER.CONFIG is empty"),
        (["DISTILL.TEACHER.CONFIG", "no.yaml"], "DISTILL.TEACHER.CONFIG is 'no.yaml': no such"),
        (["DISTILL.TEACHER.WEIGHTS", "/no.pth"], "DISTILL.TEACHER.WEIGHTS is '/no.pth'"),
        (["DISTILL.TEACHER.WEIGHTS", "http://localhost:9/x.pth"], "'http://localhost:9/x.pth'"),
        (["DISTILL.TEACHER.OPTS", "['MODEL.X', 1]"], "DISTILL.TEACHER.OPTS: no config key MODEL.X"),
        (["DISTILL.TEACHER.PRECISION", "float61"], "did you mean 'float16'?"),
        (
            ["DISTILL.FRS.CLS.LEVEL_WEIGHTS", "[1.0]"],
            "1 numbers: give 5, one per FPN level, or none",
        ),
        (["DISTILL.FRS.CLS.DECAY", "cosinus"], "did you mean 'cosine'?"),
        (["INPUT.FORMAT", "L"], "only BGR and RGB can be turned into each other"),
    ],
)
def test_bad_input_gets_one_line(run, tmp_path, opts, expected):
    message = run(FRS, *opts)
    assert message is not None and expected in message
    assert not (tmp_path / "run" / "model_final.pth").exists()


def test_more_processes_than_gpus_or_images(run):
    flags = ["--num-gpus", "999"]
    assert "--num-gpus is 999, but torch sees" in run(FRS, "MODEL.DEVICE", "cuda", flags=flags)
    assert "SOLVER.IMS_PER_BATCH is 2, expected a positive multiple" in run(FRS, flags=flags)


def test_config_that_does_not_exist(run):
    assert "--config-file is 'nothing.yaml': no such file" in run("nothing.yaml")


def test_broken_yaml(run, tmp_path):
    (tmp_path / "broken.yaml").write_text("MODEL: [")
    assert "broken.yaml" in run(str(tmp_path / "broken.yaml"))


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        main(["--debug", "--config-file", "nothing.yaml"])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a file"])
def test_corrupt_teacher(run, tmp_path, content):
    (tmp_path / "teacher.pth").write_bytes(content)
    message = run(FRS, "DISTILL.TEACHER.WEIGHTS", tmp_path / "teacher.pth")
    assert "DISTILL.TEACHER.WEIGHTS" in message and "not a checkpoint" in message


@pytest.mark.parametrize("lost", ["head.cls_score.bias", "backbone.bottom_up.stem.conv1.norm"])
def test_teacher_with_an_unfilled_tensor(run, tmp_path, lost):
    state = detector("shapes/baselines/fcos_tiny_teacher.yaml").state_dict()
    state = {k: v for k, v in state.items() if not k.startswith(lost)}
    torch.save({"model": state}, tmp_path / "teacher.pth")
    message = run(FRS, "DISTILL.TEACHER.WEIGHTS", tmp_path / "teacher.pth")
    assert "does not fill" in message and lost in message


def test_teacher_of_another_shape(run):
    message = run(FRS, "DISTILL.TEACHER.OPTS", "['MODEL.BASIC_RESNET.WIDTH', 16]")
    assert "DISTILL.TEACHER.WEIGHTS is 'd2kd://fcos_tiny_teacher.pth': it does not fill" in message

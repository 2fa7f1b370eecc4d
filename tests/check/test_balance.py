"""``d2kd balance``: weights from the gradients of a short run."""

import pytest

from d2kd.cli.main import main

CPU = [
    "MODEL.DEVICE",
    "cpu",
    "SOLVER.IMS_PER_BATCH",
    "2",
    "DATALOADER.NUM_WORKERS",
    "0",
    "SEED",
    "1",
]
RECIPE = "shapes/frs/fcos_tiny.yaml"


def proposals(capsys, *words):
    main(["balance", RECIPE, "--steps", "4", *words, *CPU])
    *_, overrides = capsys.readouterr().out.strip().splitlines()
    words = overrides.split()
    return dict(zip(words[::2], map(float, words[1::2])))


def test_proposals_follow_the_share_not_the_weight(capsys, tmp_path):
    out = ["OUTPUT_DIR", str(tmp_path / "run")]
    first = proposals(capsys, "--share", "0.5", *out)
    assert set(first) == {"DISTILL.FRS.CLS.WEIGHT", "DISTILL.FRS.FEATURE.WEIGHT"}
    doubled = proposals(capsys, "--share", "1.0", *out)
    assert doubled == pytest.approx({k: 2 * v for k, v in first.items()}, rel=0.1)
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--share", "0"], "--share is 0.0"),
        (["DISTILL.METHODS", "[]"], "nothing to balance"),
        (
            ["DISTILL.FRS.CLS.WEIGHT", "0.0", "DISTILL.FRS.FEATURE.START_ITER", "100"],
            "no gradient of a term reaches the FPN in 4 steps",
        ),
    ],
)
def test_what_cannot_be_balanced_is_one_line(capsys, tmp_path, words, message):
    with pytest.raises(SystemExit):
        proposals(capsys, *words, "OUTPUT_DIR", str(tmp_path / "run"))
    assert message in capsys.readouterr().err

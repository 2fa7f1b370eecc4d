"""Reading configs: renamed keys are answered with today's names, and 0 is a number like 0.0."""

import pytest
from toys import STUDENTS

from d2kd.config import default_config, read_config
from d2kd.errors import UserError

# As in the table of CHANGELOG.md for 0.2.0
RENAMED = {
    "CROSSKD.TAP": "CROSSKD.DEPTH",
    "DEFEAT.ASSIGN": "DEFEAT.NECK_ASSIGN (and DISTILL.DEFEAT.STAGE_ASSIGN)",
    "DEFEAT.SAMPLING": "DEFEAT.PROPOSALS_FROM",
    "GDETKD.ROIS": "GDETKD.PROPOSALS_FROM",
    "GDETKD.PRE_RELU": "GDETKD.PRE_ACTIVATION",
    "HGD.TAP": "HGD.PRE_ACTIVATION ('pre_relu' is True, 'post_relu' is False)",
    "HGD.BETA_S": "HGD.SPATIAL_POWER",
    "HGD.BETA_C": "HGD.CHANNEL_POWER",
    "HGD.GAP_GAMMA": "HGD.GAP_POWER",
    "HGD.FG_KAPPA": "HGD.FOREGROUND",
    "HGD.W_MAX": "HGD.MAX_WEIGHT",
    "HGD.ETA": "HGD.MACRO_POWER",
}


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_renamed_key_is_refused_with_its_new_name(tmp_path, old, new):
    node, key = old.split(".")
    path = tmp_path / "run.yaml"
    path.write_text(f"_BASE_: {STUDENTS['FCOS']}\nDISTILL: {{{node}: {{{key}: 1}}}}\n")
    for source, words in ((str(path), []), (STUDENTS["FCOS"], [f"DISTILL.{old}", "1"])):
        with pytest.raises(UserError) as refused:
            read_config(source, words)
        assert str(refused.value).endswith(f"DISTILL.{old} is now called DISTILL.{new}")


def test_every_rename_leads_to_a_key():
    cfg = default_config()
    for new in RENAMED.values():
        node, key = new.split(" ")[0].split(".")
        assert key in cfg.DISTILL[node]


def test_whole_numbers_are_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    solver, distill = "SOLVER: {BASE_LR: 1}", "DISTILL: {FRS: {CLS: {WEIGHT: 0}}}"
    path.write_text(f"_BASE_: {STUDENTS['FCOS']}\n{solver}\n{distill}\n")
    cfg = read_config(str(path), ["DISTILL.FRS.FEATURE.WEIGHT", "2", "SOLVER.EMA_DECAY", 0])
    found = cfg.SOLVER.BASE_LR, cfg.DISTILL.FRS.CLS.WEIGHT, cfg.DISTILL.FRS.FEATURE.WEIGHT
    assert found == (1, 0, 2) and cfg.SOLVER.EMA_DECAY == 0
    assert all(type(x) is float for x in (*found, cfg.SOLVER.EMA_DECAY))


@pytest.mark.parametrize("value", ["True", "one", "[1]"])
def test_other_values_are_no_numbers(value):
    with pytest.raises(UserError, match=r"DISTILL.FRS.CLS.WEIGHT is '.+': give a number"):
        read_config(STUDENTS["FCOS"], ["DISTILL.FRS.CLS.WEIGHT", value])


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("DISTILL.METHODS", "PKD", r'give a list, such as "\[PKD\]"'),
        ("SOLVER.MAX_ITER", "many", "give a whole number"),
        ("MODEL.MASK_ON", "2", "give True or False"),
    ],
)
def test_values_of_another_type(tmp_path, key, value, words):
    with pytest.raises(UserError, match=f"command line: {key} is '{value}': {words}$"):
        read_config(STUDENTS["FCOS"], [key, value])
    *nodes, name = key.split(".")
    path = tmp_path / "run.yaml"
    path.write_text(f"_BASE_: {STUDENTS['FCOS']}\n{nodes[0]}: {{{name}: {value}}}\n")
    with pytest.raises(UserError, match=f"run.yaml: {key} is '{value}': {words}$"):
        read_config(str(path))

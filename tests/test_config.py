"""Names of config keys: those of older versions are answered with today's."""

import pytest
from detectron2.config import get_cfg
from toys import STUDENTS

from d2kd.config import add_distill_config, read_config
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
    cfg = get_cfg()
    add_distill_config(cfg)
    for new in RENAMED.values():
        node, key = new.split(" ")[0].split(".")
        assert key in cfg.DISTILL[node]

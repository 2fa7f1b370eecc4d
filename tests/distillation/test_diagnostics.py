"""What methods can say of a step, in the log."""

import pytest
from detectron2.utils.events import EventStorage
from host_syncs import HostSyncs
from toys import batch, distill_config

from d2kd.distillation import build_model

SMALL = ["DISTILL.GDETKD.QUEUE_SIZE", 100, "DISTILL.HGD.SOURCE", "both"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return build_model(distill_config(folder, "FasterRCNN", SMALL, methods=["GDetKD", "HGD"]))


def logged(model, iteration):
    """The names of what one step logs of the methods, and where the host waits for it."""
    model.train()
    with EventStorage(iteration) as storage, HostSyncs(model.student) as syncs:
        model(batch())
    waits = [where for where in syncs.found if "teacher_student.py" in where]
    return {name for name in storage.latest() if name.startswith("distill/")}, waits


def test_diagnostics_are_logged_by_method_and_term(model):
    names, waits = logged(model, 19)
    stages = [f"res{k}" for k in (2, 3, 4, 5)] + [f"p{k}" for k in (2, 3, 4, 5, 6)]
    measures = ("loss", "macro", "max_micro", "on_objects")
    expected = {f"distill/hgd_feature/{s}/{what}" for s in stages for what in measures}
    expected |= {f"distill/gdetkd_sgfi/p{k}" for k in (2, 3, 4, 5, 6)}
    expected |= {f"distill/gdetkd_sgfi/{what}" for what in ("entropy", "temperature")}
    expected |= {f"distill/gdetkd_ckd/{what}" for what in ("hit_rate", "excluded")}
    assert names == expected
    assert len(waits) == 3  # once per term, not per number


def test_other_steps_log_none(model):
    assert logged(model, 20) == (set(), [])

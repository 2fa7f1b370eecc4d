"""The tool that detects with a student's features in the teacher's head."""

import os
import sys

import pytest
import torch
from toys import AS_LOADED, STUDENTS, batch, distill_config

from d2kd.distillation import build_model

TOOLS = os.path.join(os.path.dirname(__file__), os.pardir, "tools")


@pytest.mark.parametrize("family", ["RetinaNet", "FCOS", "ATSS", "GFL"])
def test_twins_detect_the_same_by_either_head(monkeypatch, tmp_path, family):
    monkeypatch.syspath_prepend(TOOLS)
    from cross_predictions import CrossDetector

    low = [f"MODEL.{family.upper()}.SCORE_THRESH_TEST", 0.0]
    cfg = distill_config(tmp_path, family, low, methods=["CrossKD"], teacher_opts=low)
    cfg.DISTILL.CROSSKD.DEPTH = 1
    cfg.MODEL.BASIC_RESNET.WIDTH = 16
    cfg.merge_from_list(AS_LOADED)
    model = build_model(cfg).eval()
    model.student.load_state_dict(model.teacher.detector.state_dict())
    inputs = batch()
    with torch.no_grad():
        own, crossed = model.student(inputs), CrossDetector(model)(inputs)
    for a, b in zip(own, crossed):
        a, b = a["instances"], b["instances"]
        assert len(a) > 10
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-6)


def test_without_crosskd_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    import cross_predictions

    monkeypatch.setattr(sys, "argv", ["cross_predictions.py", STUDENTS["FCOS"]])
    with pytest.raises(SystemExit):
        cross_predictions.main()
    assert capsys.readouterr().err.startswith("error: DISTILL.METHODS is []: CrossKD is not in it")

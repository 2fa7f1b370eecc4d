"""A two-stage teacher whose box head does not use the levels that are compared."""

import logging
import re

import pytest
import torch
from detectron2.structures import Boxes
from toys import distill_config

from d2kd.check.levels import warn_of_unused_levels
from d2kd.distillation import build_model
from d2kd.views import build_family

SMALL, LARGE = (
    Boxes(torch.tensor([[0.0, 0.0, 40, 60]])),
    Boxes(torch.tensor([[0.0, 0.0, 300, 200]])),
)
STAGES = ["DISTILL.HGD.STAGES", ["res3"]]
NECK = ["DISTILL.HGD.SOURCE", "neck"]
FROM_P3 = ["MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]]


@pytest.mark.parametrize(
    "student, methods, boxes, options, warned",
    [
        ("FCOS", ["PKD", "MGD"], [SMALL], {}, "from its level of stride 4, .* that MGD, PKD may"),
        ("FCOS", ["PKD"], [SMALL, SMALL, LARGE], {}, "pools 67% of the objects"),
        ("FCOS", ["HGD"], [SMALL], {"opts": NECK}, r"\(--method GDetKD\), or take a dense"),
        ("FCOS", ["PKD"], [SMALL, LARGE], {}, ""),
        ("FCOS", ["PKD"], [SMALL[:0]], {}, ""),
        ("FCOS", ["PKD"], [SMALL], {"teacher_opts": FROM_P3}, ""),
        ("FCOS", ["HGD"], [SMALL], {"opts": STAGES}, ""),
        ("FasterRCNN", ["PKD"], [SMALL], {}, ""),
    ],
)
def test_levels_without_objects_are_told(
    tmp_path, caplog, student, methods, boxes, options, warned
):
    cfg = distill_config(tmp_path, student, teacher="FasterRCNN", methods=methods, **options)
    model = build_model(cfg)
    with caplog.at_level(logging.WARNING, "d2kd.check.levels"):
        caplog.clear()
        warn_of_unused_levels(model, boxes)
    assert bool(caplog.records) == bool(warned)
    assert not warned or re.search(warned, caplog.text)


def test_others_have_no_such_levels(tmp_path, caplog):
    model = build_model(distill_config(tmp_path, "FCOS"))
    caplog.clear()
    warn_of_unused_levels(model, [SMALL])
    warn_of_unused_levels(model.student, [SMALL])
    assert not caplog.records


def test_strides_are_those_of_the_pooler(tmp_path):
    model = build_model(distill_config(tmp_path, "FasterRCNN"))
    sizes = torch.tensor([10.0, 111.0, 113.0, 223.0, 225.0, 449.0, 4000.0])
    boxes = Boxes(torch.stack([0 * sizes, 0 * sizes, sizes, sizes], dim=1))
    strides = build_family(model.student).box_head.strides_of([boxes[:2], boxes[2:]])
    assert strides.tolist() == [4, 4, 8, 8, 16, 32, 32]

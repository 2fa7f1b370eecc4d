"""When a program counts as the detector."""

import numpy as np
import pytest

from d2kd.errors import UserError
from d2kd.export.detections import Detections
from d2kd.export.parity import FULL, check_parity, match

BOXES = np.array([[0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 10, 10]], np.float32)
CLASSES, SCORES = np.array([0, 1, 2]), np.array([0.9, 0.8, 0.8], np.float32)
FOUND = Detections(BOXES, CLASSES, SCORES)


def compare(found, expected=FOUND, images=1):
    return check_parity([expected] * images, [found] * images, [(50, 50)] * images, FULL)


def test_equal_scores_may_stand_in_any_order():
    order = [0, 2, 1]
    parity = compare(Detections(BOXES[order], CLASSES[order], SCORES[order]))
    assert parity.unmatched == 0 and parity.box_error == 0 and parity.detections == 3


def test_the_worst_error_is_told():
    shifted = BOXES + np.array([[0], [0.01], [0]], np.float32)
    parity = compare(Detections(shifted, CLASSES, SCORES - np.float32(1e-4)))
    assert parity.box_error == pytest.approx(0.01, rel=1e-3)
    assert parity.score_error == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize(
    "found",
    [
        Detections(BOXES + 1, CLASSES, SCORES),
        Detections(BOXES, CLASSES[::-1], SCORES),
        Detections(BOXES, CLASSES, SCORES - 0.1),
        Detections(BOXES[:2], CLASSES[:2], SCORES[:2]),
    ],
    ids=["boxes", "classes", "scores", "number"],
)
def test_another_result_is_refused(found):
    with pytest.raises(UserError, match="the detector finds 3 and the program"):
        compare(found)


def test_a_detection_is_matched_once():
    twice = Detections(BOXES[[0, 0]], CLASSES[[0, 0]], SCORES[[0, 0]])
    assert len(match(FOUND, twice, FULL)) == 1


def test_one_in_a_hundred_may_lack_a_counterpart():
    many = Detections(*(np.concatenate([x] * 40) for x in FOUND[:3]))
    lost = Detections(*(x[1:] for x in many[:3]))
    assert compare(lost, many).unmatched == 1


def test_no_detections_are_equal():
    nothing = Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    assert compare(nothing, nothing).unmatched == 0
    with pytest.raises(UserError):
        compare(FOUND, nothing)

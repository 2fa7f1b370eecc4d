"""Which method two detectors get, by their names alone."""

import pytest

from d2kd.errors import UserError
from d2kd.pairing import Classes, choose, open_pair
from d2kd.pairing.finetune import finetuned
from d2kd.views.families.dense import DenseFamily

TINY = "shapes/baselines/{}_tiny"
WEIGHTS = ["DISTILL.TEACHER.WEIGHTS", "teacher.pth"]


def pair(student, teacher, *opts):
    return open_pair(TINY.format(student), TINY.format(teacher) + "_teacher", [*WEIGHTS, *opts])


@pytest.mark.parametrize(
    "student, teacher, method",
    [
        ("fcos", "fcos", "FRS"),
        ("retinanet", "retinanet", "FRS"),
        ("gfl", "gfl", "FRS"),
        ("faster_rcnn", "faster_rcnn", "DeFeat"),
        ("mask_rcnn", "faster_rcnn", "DeFeat"),
        ("fcos", "faster_rcnn", "PKD"),
        ("gfl", "atss", "PKD"),
    ],
)
def test_default_of_a_pair(student, teacher, method):
    found = choose(open_pair(TINY.format(student), TINY.format(teacher), WEIGHTS))
    assert found.methods == [method] and found.reason
    assert method not in found.others and "HGD" in found.others


def test_crosskd_where_frs_has_no_published_values():
    found = choose(open_pair("baselines/atss_R_50_FPN_1x", "mmdet/atss_R_101_FPN_1x"))
    assert found.methods == ["CrossKD"] and "FRS" in found.others


def test_without_an_fpn_stages_are_left():
    names = ("COCO-Detection/faster_rcnn_R_50_C4_1x", "COCO-Detection/faster_rcnn_R_101_C4_3x")
    found = choose(open_pair(*names))
    assert found.methods == ["HGD"] and found.others == []


def test_other_classes_leave_features():
    found = choose(pair("fcos", "fcos", "MODEL.FCOS.NUM_CLASSES", "2"))
    assert found.methods == ["PKD"] and "CrossKD" not in found.others and "MGD" in found.others


def test_a_method_that_compares_predictions_needs_the_same_classes():
    two = pair("fcos", "fcos", "MODEL.FCOS.NUM_CLASSES", "2")
    with pytest.raises(UserError, match="number of classes is 2 .* or add --finetune-teacher"):
        choose(two, ["CrossKD"])
    assert choose(two, ["PKD", "MGD"]).methods == ["PKD", "MGD"]


def test_as_many_classes_of_other_names():
    animals = pair("fcos", "fcos")._replace(teacher_classes=Classes(6, ("cat", "dog")))
    found = choose(animals)
    assert found.methods == ["PKD"] and "FRS" not in found.others
    with pytest.raises(
        UserError, match=r"6 classes \(cat, dog\): .* DISTILL.FRS.CLS.WEIGHT; or add"
    ):
        choose(animals, ["FRS"])


@pytest.mark.parametrize(
    "names, message",
    [
        (["FRSS"], "--method is 'FRSS': did you mean 'FRS'"),
        (["LD"], "the student FCOS predicts distances"),
    ],
)
def test_what_was_asked_is_checked(names, message):
    with pytest.raises(UserError, match=message):
        choose(pair("fcos", "fcos"), names)


@pytest.mark.parametrize(
    "a, b, same",
    [
        (Classes(2, ("cat", "dog")), Classes(2, ("Cat", "dog")), True),
        (Classes(2, ("cat", "dog")), Classes(2, ("dog", "cat")), False),
        (Classes(2, ("cat", "dog")), Classes(2, ()), True),
        (Classes(2, ()), Classes(3, ()), False),
        (Classes(None, ()), Classes(3, ("cat", "dog", "cow")), True),
        (Classes(None, ("cat", "dog")), Classes(2, ("dog", "cat")), False),
        (Classes(None, ()), Classes(0, ()), True),
    ],
)
def test_classes_are_compared_as_far_as_they_are_known(a, b, same):
    assert a.same_as(b) is same and b.same_as(a) is same


def test_classes_that_nobody_counts_are_not_none():
    assert str(Classes(None, ())) == "unknown classes" and str(Classes(0, ())) == "0 classes"


def test_a_student_that_does_not_say_learns_the_classes_of_its_data(monkeypatch):
    monkeypatch.setattr(DenseFamily, "num_classes", None)
    found = pair("fcos", "fcos")
    assert (found.student_classes.count, found.teacher_classes.count) == (6, None)
    assert found.same_classes and finetuned(found).teacher_classes.count == 6
    unknown = found._replace(student_classes=Classes(None, ()))
    with pytest.raises(UserError, match="neither the data nor DenseFamily.num_classes says"):
        finetuned(unknown)


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        ("nowhere", TINY.format("fcos"), "--student is 'nowhere': no such file"),
        (TINY.format("fcos"), "nowhere.yaml", "--teacher is 'nowhere.yaml': no such file"),
        (TINY.format("fcos"), "nowhere.pth", "'nowhere.pth' is not there"),
    ],
)
def test_names_that_are_nowhere(student, teacher, message):
    with pytest.raises(UserError, match=message):
        open_pair(student, teacher)


def test_a_python_student_says_itself_what_teaches_it(tmp_path):
    (tmp_path / "student.py").write_text("model = None\n")
    with pytest.raises(UserError, match="a Python config: .* train it with --config-file"):
        open_pair(str(tmp_path / "student.py"), TINY.format("fcos"))

"""From configs to teachers, students and distillers."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from toys import STUDENTS, batch, config, detector, distill_config, step

from d2kd.config import student_config
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.modeling import TeacherStudent, build_model
from d2kd.modeling.build import _check_offers, build_teacher_detector
from d2kd.modeling.weights import checksum


def test_no_method_is_the_plain_detector():
    model = build_model(config(STUDENTS["FCOS"]))
    assert type(model) is META_ARCH_REGISTRY.get("FCOS")


def test_teacher_student_is_a_registered_architecture(tmp_path):
    cfg = distill_config(tmp_path, "FCOS")
    model = META_ARCH_REGISTRY.get("TeacherStudent")(cfg)
    assert isinstance(model, TeacherStudent)
    assert set(model.distillers) == {"FRS"}


def test_teacher_weights_come_from_its_own_config_when_not_given(tmp_path):
    teacher = detector("shapes/fcos_tiny_teacher.yaml", seed=5)
    torch.save({"model": teacher.state_dict()}, tmp_path / "model.pth")
    opts = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "MODEL.ROI_BOX_HEAD.FC_DIM", 16]
    distill = ["DISTILL.METHODS", ["FRS"], "DISTILL.TEACHER.OPTS", opts]
    distill += ["DISTILL.TEACHER.CONFIG", "shapes/fcos_tiny_teacher.yaml"]
    model = build_model(config(STUDENTS["FCOS"], distill))
    assert checksum(model.teacher.detector) == checksum(teacher)


def teacher_of(name, *opts):
    cfg = config(STUDENTS["FCOS"], ["DISTILL.TEACHER.CONFIG", name, *opts])
    with torch.device("meta"):
        return build_teacher_detector(cfg)


def test_teacher_of_the_model_zoo_brings_its_weights():
    teacher, input_format, weights = teacher_of("COCO-Detection/retinanet_R_101_FPN_3x.yaml")
    assert type(teacher).__name__ == "RetinaNet" and input_format == "BGR"
    assert weights.startswith("https://") and weights.endswith("model_final_971ab9.pkl")


def test_teacher_from_a_python_config():
    opts = ["DISTILL.TEACHER.OPTS", ["model.num_classes=6"]]
    teacher, input_format, weights = teacher_of("COCO-Detection/fcos_R_50_FPN_1x.py", *opts)
    assert teacher.num_classes == 6 and input_format == "BGR" and weights == ""


def test_every_method_documents_a_node_of_its_own():
    cfg = config(STUDENTS["FCOS"])
    for name, method in DISTILLER_REGISTRY:
        node = cfg.DISTILL[name.upper()]
        assert all(term.upper() in node for term in method.requires), name
        assert method.__doc__


def test_a_term_that_reads_what_the_student_lacks_is_refused():
    cfg = config(STUDENTS["FCOS"])
    teacher = SimpleNamespace(name="FCOS", offers={"features", "dense"})
    student = SimpleNamespace(name="Other", offers={"features"})
    with pytest.raises(
        UserError, match=r"DISTILL.FRS.CLS.WEIGHT .* dense .* Other offers only features"
    ):
        _check_offers(DISTILLER_REGISTRY.get("FRS"), cfg, student, teacher)


def test_methods_are_listed_once(tmp_path):
    with pytest.raises(UserError, match="names 'FRS' twice"):
        build_model(distill_config(tmp_path, "FCOS", methods=["FRS", "FRS"]))


def test_student_config_has_only_what_differs(tmp_path):
    cfg = distill_config(tmp_path, "RetinaNet", ["SOLVER.OPTIMIZER", "AdamW"])
    student = student_config(cfg)
    assert "DISTILL" not in student and "OPTIMIZER" not in student.SOLVER
    assert "FCOS" not in student.MODEL and "RPN" not in student.MODEL
    assert str(tmp_path / "run" / "model_final.pth") == student.MODEL.WEIGHTS


def test_moving_the_model_moves_the_teacher(tmp_path):
    model = build_model(distill_config(tmp_path, "FCOS")).double()
    assert all(p.dtype == torch.double for p in model.teacher.detector.parameters())


def test_several_teachers_steps_do_not_grow_memory_of_views(tmp_path):
    """Nothing of a step is kept but detached values."""
    model = build_model(distill_config(tmp_path, "FCOS"))
    step(model, batch())
    assert all(not value.requires_grad for value in model.last_terms.values())

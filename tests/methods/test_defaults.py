"""Methods default to the values that were published for the student's kind."""

import pytest
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from torch import nn
from toys import STUDENTS, config, distill_config

from d2kd.distillation import build_model
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.schema import get_value

EXPECTED = {
    ("FRS", "RetinaNet"): {"FEATURE.WEIGHT": 0.005, "CLS.WEIGHT": 0.02},
    ("FRS", "GFL"): {"FEATURE.WEIGHT": 0.1, "CLS.WEIGHT": 0.05},
    ("FRS", "FasterRCNN"): {"FEATURE.WEIGHT": 0.002, "CLS.WEIGHT": 0.1},
    ("PKD", "ATSS"): {"FEATURE.WEIGHT": 1.0},
    ("PKD", "GFL"): {"FEATURE.WEIGHT": 6.0},
    ("CrossKD", "FCOS"): {"DEPTH": 2, "CLS.WEIGHT": 0.4, "BBOX_LOSS": "giou"},
    ("CrossKD", "GFL"): {"DEPTH": 3, "BBOX.WEIGHT": 4.0, "BBOX_LOSS": ""},
    ("Mimicking", "ATSS"): {"CENTERNESS.WEIGHT": 1.0},
    ("GDetKD", "RetinaNet"): {"CLS.WEIGHT": 0.0, "BBOX.WEIGHT": 0.0},
    ("GDetKD", "FasterRCNN"): {"CLS.WEIGHT": 1.0, "BBOX.WEIGHT": 1.0},
}


@pytest.mark.parametrize("method, student", EXPECTED)
def test_defaults_follow_the_student(method, student):
    node = config(STUDENTS[student]).DISTILL[method.upper()]
    for key, value in EXPECTED[method, student].items():
        assert get_value(node, key) == value


@pytest.mark.parametrize("name", [name for name, _ in DISTILLER_REGISTRY])
def test_defaults_are_keys_of_the_method(name):
    method = DISTILLER_REGISTRY.get(name)
    for architecture in method.defaults_of:
        node = method.default_config()
        method.use_defaults_of(node, architecture)
        method.check_config(node)
        assert method.source_of_values(node, architecture)


@pytest.mark.parametrize("name", [name for name, _ in DISTILLER_REGISTRY])
def test_a_weight_of_ones_own_has_no_source(name):
    """Of every term, also those that default to the same for all kinds of student."""
    method = DISTILLER_REGISTRY.get(name)
    for architecture in method.defaults_of:
        for term in method.all_terms():
            node = method.default_config()
            method.use_defaults_of(node, architecture)
            node[term.upper()].WEIGHT = 7.0
            assert method.source_of_values(node, architecture).startswith("as the config says, not")


def test_overrides_come_before_defaults():
    given = ["DISTILL.FRS.CLS.WEIGHT", 0.25, "MODEL.META_ARCHITECTURE", "GFL"]
    node = config(STUDENTS["FCOS"], given).DISTILL.FRS
    assert (node.FEATURE.WEIGHT, node.CLS.WEIGHT) == (0.1, 0.25)


@pytest.mark.parametrize(
    "student, opts, said",
    [
        ("GFL", [], "Values of FRS: the authors', for GFL"),
        ("GFL", ["DISTILL.FRS.CLS.WEIGHT", 9.0], "Values of FRS: as the config says, not the"),
        ("ATSS", [], "Values of FRS: nobody's for ATSS, search your own"),
    ],
)
def test_the_report_says_whose_values_they_are(tmp_path, caplog, student, opts, said):
    with caplog.at_level("INFO"):
        build_model(distill_config(tmp_path, student, opts))
    assert said in caplog.text


@pytest.mark.parametrize("method, said", [("HGD", True), ("DeFeat", True), ("FRS", False)])
def test_the_report_says_what_one_should_know_before_quoting(tmp_path, caplog, method, said):
    caveat = DISTILLER_REGISTRY.get(method).caveat
    with caplog.at_level("INFO"):
        build_model(distill_config(tmp_path, "RetinaNet", methods=(method,)))
    assert bool(caveat) == said and (f"\n{method}: {caveat}" in caplog.text) == said


@pytest.mark.parametrize("base, weight", [(RetinaNet, 2.0), (nn.Module, 6.0)])
def test_a_class_of_ones_own_has_the_defaults_of_what_it_is_derived_from(base, weight):
    META_ARCH_REGISTRY.register(type("OfOnesOwn", (base,), {}))
    try:
        given = ["MODEL.META_ARCHITECTURE", "OfOnesOwn"]
        node = config(STUDENTS["RetinaNet"], given).DISTILL.PKD
        assert weight == node.FEATURE.WEIGHT
    finally:
        del META_ARCH_REGISTRY._obj_map["OfOnesOwn"]

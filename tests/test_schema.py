"""Config keys: what a value may be stands beside its default, and one check says what is wrong."""

import math

import pytest
from detectron2.config import CfgNode
from toys import STUDENTS, config

from d2kd.config import check_config, default_config
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.schema import Key, check_node, check_values, config_node, walk

KEYS = {
    "COUNT": Key(3, low=1),
    "POWER": Key(1.0, low=-2, high=2),
    "TEMPERATURE": Key(1.0, above=0),
    "DECAY": Key(0.0, low=0, below=1),
    "SIDE": Key("student", choices=("student", "teacher")),
    "DEPTH": Key(2, choices=(2, 4)),
    "ON": Key(False),
    "PAIR": Key([1.0, 2.0], low=0, length=2),
    "WEIGHTS": Key((1.0,) * 4, length=(4, 5)),
    "NAMES": Key([], item=str),
    "ANYTHING": Key([], item=object),
    "TERM": {"WEIGHT": Key(1.0, low=0)},
}

RIGHT = [
    ("COUNT", 1),
    ("POWER", -2),  # a whole number is a number
    ("POWER", 2.0),
    ("TEMPERATURE", 1e-9),
    ("DECAY", 0),
    ("DECAY", 0.9999),
    ("SIDE", "teacher"),
    ("DEPTH", 4),
    ("ON", True),
    ("PAIR", (0, 5.5)),
    ("WEIGHTS", (1.0,) * 5),
    ("NAMES", []),
    ("NAMES", ["p3", "p4"]),
    ("ANYTHING", ["MODEL.X", 3, None]),
]
WRONG = [
    ("COUNT", 0, "give 1 or more"),
    ("COUNT", 1.0, "give a whole number"),
    ("COUNT", True, "give a whole number"),
    ("COUNT", None, "give a whole number"),
    ("POWER", 2.5, "give -2 ... 2"),
    ("POWER", "1e-3", "give a number"),
    ("POWER", False, "give a number"),
    ("POWER", math.nan, "give a finite number"),
    ("POWER", math.inf, "give a finite number"),
    ("TEMPERATURE", 0, "give a number above 0"),
    ("DECAY", 1.0, "give a number below 1"),
    ("DECAY", -0.1, "give 0 or more"),
    ("SIDE", "techer", "did you mean 'teacher'?"),
    ("SIDE", "xyz", "known: student, teacher"),
    ("SIDE", 1, "give a name"),
    ("DEPTH", 3, "give one of [2, 4]"),
    ("ON", 1, "give True or False"),
    ("PAIR", 1.0, "give a list"),
    ("PAIR", [1.0], "give 2 values"),
    ("PAIR", [1.0, -1.0], "give 0 or more, each"),
    ("PAIR", [1.0, math.nan], "give a finite number, each"),
    ("WEIGHTS", [1.0], "give 4 or 5 values"),
    ("NAMES", "p3", "give a list"),
    ("NAMES", ["p3", 4], "give a name, each"),
]


def changed(name, value):
    node = config_node(KEYS)
    node[name] = value
    return node


@pytest.mark.parametrize("name, value", RIGHT)
def test_right_values_pass(name, value):
    assert KEYS[name].problem(value) is None
    check_node(changed(name, value), KEYS, "DISTILL.X")


@pytest.mark.parametrize("name, value, advice", WRONG)
def test_wrong_values_are_named_with_what_would_be_right(name, value, advice):
    with pytest.raises(UserError) as error:
        check_node(changed(name, value), KEYS, "DISTILL.X")
    assert str(error.value) == f"DISTILL.X.{name} is {value!r}: {advice}"


def test_every_wrong_value_is_named_at_once():
    node = changed("COUNT", 0)
    node.TERM.WEIGHT = -1.0
    with pytest.raises(UserError, match=r"X.COUNT is 0: .*; X.TERM.WEIGHT is -1.0: give 0 or more"):
        check_node(node, KEYS, "X")


def test_a_node_has_the_defaults_and_shares_none_of_its_lists():
    node = config_node(KEYS)
    assert node.COUNT == 3 and node.SIDE == "student" and node.TERM.WEIGHT == 1.0
    node.PAIR.append(3.0)
    assert KEYS["PAIR"].default == [1.0, 2.0] and config_node(KEYS).PAIR == [1.0, 2.0]


def test_keys_are_walked_with_their_full_names():
    names = [name for name, _ in walk(KEYS, "DISTILL.X")]
    assert names[0] == "DISTILL.X.COUNT" and names[-1] == "DISTILL.X.TERM.WEIGHT"
    assert len(names) == len(KEYS)


@pytest.mark.parametrize("method", [name for name, _ in DISTILLER_REGISTRY])
def test_every_key_of_a_method_is_explained_and_its_default_is_right(method):
    cls = DISTILLER_REGISTRY.get(method)
    cls.check_config(cls.default_config())
    assert all(key.help for _, key in walk(cls.keys, cls.node_name()))


# Values of the whole config, Detectron2's included


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "A.B has no value: the default is 1.0"),
        (math.nan, "A.B is nan: give finite numbers"),
        ([1.0, [math.inf]], r"A.B is \[1.0, \[inf\]\]: give finite numbers"),
        (10**400, "A.B is 10+: give a number below 2\\^63"),
        ("a\0b", r"A.B is 'a\\x00b': give text in UTF-8, without a zero byte"),
        (["\udce9"], "A.B is .*: give text in UTF-8"),
    ],
)
def test_values_that_cannot_be_used_are_refused(value, message):
    defaults = CfgNode({"A": {"B": 1.0}})
    with pytest.raises(UserError, match=message):
        check_values(CfgNode({"A": {"B": value}}), defaults)


def test_what_is_infinite_or_missing_by_default_may_stay():
    defaults = CfgNode({"A": None, "B": [0.0, math.inf]})
    check_values(defaults.clone(), defaults)


def test_values_are_checked_when_a_config_is_read():
    with pytest.raises(UserError, match="SOLVER.BASE_LR is nan"):
        config(STUDENTS["FCOS"], ["SOLVER.BASE_LR", float("nan")])
    with pytest.raises(UserError, match="DISTILL.TEACHER.PRECISION is 'float61': did you mean"):
        config(STUDENTS["FCOS"], ["DISTILL.TEACHER.PRECISION", "float61"])
    with pytest.raises(UserError, match="SOLVER.OPTIMIZER is 'Adam': did you mean 'AdamW'"):
        config(STUDENTS["FCOS"], ["SOLVER.OPTIMIZER", "Adam"])


def test_values_are_checked_when_a_config_was_changed_in_python():
    cfg = default_config()
    check_config(cfg)
    cfg.DISTILL.FRS.FEATURE.WEIGHT = -1.0
    with pytest.raises(UserError, match="DISTILL.FRS.FEATURE.WEIGHT is -1.0: give 0 or more"):
        check_config(cfg)

"""Which FPN levels and backbone stages of two detectors have equal stride."""

from types import SimpleNamespace

import pytest
from toys import STUDENTS, detector

from d2kd.errors import UserError
from d2kd.views import Level, build_family, channels_of, paired_levels, paired_stages


def network(levels=(), stages=()):
    return SimpleNamespace(
        levels=[Level(f"p{s}", s, width, i) for i, (s, width) in enumerate(levels)],
        stages=[Level(f"res{s}", s, width, i) for i, (s, width) in enumerate(stages)],
    )


def names(pairs):
    return [(ours.name, theirs.name) for ours, theirs in pairs]


def test_levels_of_detectors_pair_by_stride():
    dense = build_family(detector(STUDENTS["FCOS"]))
    two_stage = build_family(detector(STUDENTS["FasterRCNN"]))
    pairs = paired_levels(dense, two_stage, "X")
    assert names(pairs) == [(f"p{i}",) * 2 for i in (3, 4, 5, 6)]
    assert [(a.index, b.index) for a, b in pairs] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert all(a.stride == b.stride for a, b in pairs)


def test_levels_without_a_partner_are_left_out():
    ours = network(levels=[(8, 16), (16, 16), (128, 16)])
    theirs = network(levels=[(4, 32), (8, 32), (16, 64)])
    pairs = paired_levels(ours, theirs, "X")
    assert names(pairs) == [("p8", "p8"), ("p16", "p16")]
    assert channels_of(pairs) == [(16, 32), (16, 64)]
    with pytest.raises(
        UserError, match=r"X: no FPN level in common; strides .* \[8\], of the .* \[4\]"
    ):
        paired_levels(network(levels=[(8, 16)]), network(levels=[(4, 16)]), "X")


def test_named_stages_pair_by_stride():
    ours, theirs = (network(stages=[(s, 8 * k) for s in (4, 8, 16)[k - 1 :]]) for k in (1, 2))
    assert names(paired_stages(ours, theirs, ["res16", "res8"], "X")) == [
        ("res16", "res16"),
        ("res8", "res8"),
    ]
    assert channels_of(paired_stages(ours, theirs, ["res8"], "X")) == [(8, 16)]
    with pytest.raises(UserError, match=r"X names 'res9': "):
        paired_stages(ours, theirs, ["res9"], "X")
    with pytest.raises(
        UserError, match=r"X names 'res4' of stride 4, but .* \[8, 16\]: leave it out"
    ):
        paired_stages(ours, theirs, ["res8", "res4"], "X")

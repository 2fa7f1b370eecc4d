"""HGD: which stages of two networks correspond, and maps of other size."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from d2kd.errors import UserError
from d2kd.methods.hgd.pairs import resize, trained_stage_pairs
from d2kd.views import Level


def network(strides, first=2, levels=(), width=8):
    return SimpleNamespace(
        name="Network",
        stages=[Level(f"res{first + i}", s, width) for i, s in enumerate(strides)],
        levels=[Level(f"p{s}", s, 8) for s in levels],
        is_trained=lambda name: True,
    )


def pairs(ours, theirs, pairing="stride", names=(), part="stages"):
    found, frozen = trained_stage_pairs(ours, theirs, (part,), names, pairing, "DISTILL.X")
    assert not frozen
    return [(pair.student.name, pair.teachers[0].name) for pair in found]


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        ([4, 8, 16, 32], [4, 8, 16, 32], "22334455"),
        ([4, 8, 16, 32], [2, 4, 8, 16, 32], "23344556"),
        ([8, 16, 32], [4, 8, 16, 32], "233445"),
        ([4, 8, 16, 32], [8, 16], "22324353"),  # nearest
        ([8, 16], [4, 16], "2333"),  # as near to 4 as to 16: the deeper one
        ([4, 8, 16, 16], [4, 8, 16, 32], "22334455"),  # dilated: by order
        ([4, 8, 16, 32], [4, 8, 8, 8], "22334455"),
        ([3, 6, 12], [4, 8, 16], "223344"),  # nothing in common, but as many
        ([8, 16], [4, 8, 8, 8], "2535"),  # the deepest of equal stride
    ],
)
def test_stages_pair_by_stride(ours, theirs, expected):
    found = pairs(network(ours), network(theirs))
    assert found == [(f"res{a}", f"res{b}") for a, b in zip(expected[::2], expected[1::2])]


def test_levels_pair_by_equal_stride_alone():
    ours, theirs = network([], levels=[8, 16, 32, 64, 128]), network([], levels=[4, 8, 16, 32, 64])
    assert pairs(ours, theirs, part="features") == [(f"p{s}", f"p{s}") for s in (8, 16, 32, 64)]


def test_order_counts_from_the_coarsest():
    found = pairs(network([4, 8, 16, 32]), network([8, 16, 32]), "order")
    assert found == [("res3", "res2"), ("res4", "res3"), ("res5", "res4")]


def test_names_choose_and_keep_their_partner():
    found = pairs(network([4, 8, 16, 16]), network([4, 8, 16, 32]), names=["res5", "res3"])
    assert found == [("res3", "res3"), ("res5", "res5")]


def test_nothing_in_common():
    with pytest.raises(UserError, match=r"DISTILL.X.STAGES: no stage .* \[4, 8\], .* \[16\]: take"):
        pairs(network([4, 8]), network([16]))


@pytest.mark.parametrize("pairing", ["stride", "order", "learned"])
def test_a_teacher_without_levels(pairing):
    with pytest.raises(UserError, match=r"DISTILL.X.STAGES: no stage in common; .* teacher \[\]"):
        pairs(network([], levels=[8, 16]), network([4, 8]), pairing, part="features")


def test_unknown_names_list_those_that_exist():
    with pytest.raises(UserError, match=r"names res9: the student \(Network\) has res2, res3$"):
        pairs(network([4, 8]), network([4, 8]), names=["res9", "res2"])


def test_names_without_a_partner():
    ours, theirs = network([], levels=[8, 16, 128]), network([], levels=[8, 16])
    with pytest.raises(UserError, match=r"DISTILL.X.STAGES: no partner of p128; strides"):
        pairs(ours, theirs, names=["p8", "p128"], part="features")


@pytest.mark.parametrize(
    "ours, theirs, pairing, expected",
    [
        ([8, 16, 32], [4, 8, 16, 32, 64], "stride", ["8 4", "16", "32 64"]),
        ([8, 32], [8, 16, 32], "stride", ["8", "32 16"]),  # as near to 8 as to 32: the deeper one
        ([8, 16], [4, 8, 16, 32], "order", ["16 4 8", "32"]),
        ([8, 16], [8, 16], "stride", ["8", "16"]),
        ([8, 16], [4, 8, 16], "learned", ["4 8 16", "4 8 16"]),
    ],
)
def test_unpaired_stages_join_the_nearest_pair(ours, theirs, pairing, expected):
    both = network([], levels=ours), network([], levels=theirs)
    options = ("features",), (), pairing, "DISTILL.X"
    found, _ = trained_stage_pairs(*both, *options, unpaired="average")
    assert [" ".join(t.name[1:] for t in pair.teachers) for pair in found] == expected
    if pairing != "learned":
        dropped, _ = trained_stage_pairs(*both, *options)
        assert [pair.teachers for pair in dropped] == [pair.teachers[:1] for pair in found]


def test_stages_of_different_width_are_not_averaged():
    theirs = network([4, 8])
    theirs.stages.append(Level("res4", 16, 32))
    with pytest.raises(UserError, match=r"UNPAIRED is 'average'.* res3 of .* \[8, 32\] channels"):
        trained_stage_pairs(
            network([4, 8]), theirs, ("stages",), (), "stride", "DISTILL.X", unpaired="average"
        )


def test_resize_averages_or_interpolates():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize(x, (4, 4)) is x
    assert resize(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resize(x, (8, 8)).shape == (1, 1, 8, 8)
    interpolated = F.interpolate(x, (2, 8), mode="bilinear", align_corners=False)
    assert torch.equal(resize(x, (2, 8)), interpolated)

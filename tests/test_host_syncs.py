"""The counter of host syncs finds what it is there for."""

import os

import pytest
import torch
from host_syncs import DETECTRON2, ON_A_CPU, OURS, HostSyncs
from torch import nn

x = torch.arange(6.0)
WAITS = {
    "item": "x.sum().item()",
    "bool": "bool(x.sum() > 0)",
    "mask": "x[x > 2]",
    "masked_select": "x.masked_select(x > 2)",
    "assignment": "x.clone().__setitem__(x > 2, torch.ones(3))",
    "nonzero": "(x > 2).nonzero()",
    "where": "torch.where(x > 2)",
    "unique": "x.unique()",
    "equal": "torch.equal(x, x)",
    "bincount": "x.long().bincount()",
    "repeat": "x.repeat_interleave(torch.ones(6).long())",
    "tolist": "x.tolist()",
    "cpu": "x.cpu()",
    "upload": "torch.tensor([1, 2], device='cpu')",
}
FREE = ["x[torch.tensor([1, 2])]", "x.topk(3)", "torch.where(x > 2, x, 0 * x)", "x[1:3]"]
FREE += ["x.repeat_interleave(torch.ones(6).long(), output_size=6)", "x.to(torch.float64)"]


def count(code, path):
    """The code, as if it stood in a file."""
    with HostSyncs(nn.Identity()) as syncs:
        eval(compile(code, path, "eval"))
    return syncs.found


@pytest.mark.parametrize("code", WAITS.values(), ids=WAITS)
def test_what_waits_is_found(code):
    (found,) = count(code, OURS + "methods/a.py")
    assert found.startswith("d2kd/methods/a.py:1: ")
    assert not count(code, "/x/tests/a.py") and not count(code, DETECTRON2 + "a.py")


@pytest.mark.parametrize("code", FREE)
def test_what_does_not_wait_is_not(code):
    assert not count(code, OURS + "methods/a.py")


def test_detectron2s_own_are_not_ours():
    code = "__import__('detectron2.layers').layers.nonzero_tuple(x > 2)"
    assert not count(code, OURS + "methods/a.py")


def test_what_runs_on_a_cpu_alone_is_left_out():
    assert os.path.exists(ON_A_CPU) and not count("x.tolist()", ON_A_CPU)


def test_a_module_that_is_left_out_is_not_counted():
    class Waits(nn.Module):
        def forward(self, x):
            return eval(compile("x.tolist()", OURS + "modeling/a.py", "eval"))

    module = Waits()
    with HostSyncs(module) as syncs:
        module(x)
        assert not syncs.found
        eval(compile("x.tolist()", OURS + "modeling/a.py", "eval"))
    assert len(syncs.found) == 1
    assert torch.Tensor.tolist(x) == [0, 1, 2, 3, 4, 5]

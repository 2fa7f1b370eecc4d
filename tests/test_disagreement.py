"""The tool that counts where a teacher and the ground truth disagree."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from toys import STUDENTS

TOOLS = os.path.join(os.path.dirname(__file__), os.pardir, "tools")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import disagreement

    return disagreement


def test_counts_of_a_batch(tool):
    """One image, two classes, anchors of two levels with one and two locations."""
    labels = torch.tensor([[0, 2, -1]])  # class 0, background, ignored
    logits = [
        torch.tensor([2.0, 2.0]).view(1, 2, 1, 1),  # the teacher sees both classes here
        torch.tensor([[-2.0, 2.0], [-2.0, 2.0]]).view(1, 2, 1, 2),  # nothing, then both
    ]
    head = SimpleNamespace(num_anchors=1, num_classes=2)
    student = SimpleNamespace(assignment=SimpleNamespace(labels=labels, valid=labels >= 0))
    teacher = SimpleNamespace(
        family=SimpleNamespace(dense_head=head), predictions=SimpleNamespace(logits=logits)
    )
    found = tool.count(student, teacher)
    assert found == (1, 2, 1) and found.share == 0.5  # the ignored anchor does not count
    assert tool.Counts(0, 0, 0).share == 0


def test_another_method_is_refused_in_one_line(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["disagreement.py", STUDENTS["FCOS"]])
    with pytest.raises(SystemExit):
        tool.main()
    assert capsys.readouterr().err.startswith("error: DISTILL.METHODS is []: give a recipe of Mim")

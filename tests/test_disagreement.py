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
    assert found[:3] == (1, 2, 1) and found.share == 0.5  # the ignored anchor does not count
    empty = tool.Counts(0, 0, 0, 0)
    assert empty.share == empty.share_of_other_classes == 0


@pytest.mark.parametrize("logits, others", [((3.0, 2.0), 0), ((2.0, 3.0), 1), ((-9.0, -8.0), 1)])
def test_other_classes_are_told_by_the_highest_score(tool, logits, others):
    labels = torch.tensor([[0]])
    head = SimpleNamespace(num_anchors=1, num_classes=2)
    student = SimpleNamespace(assignment=SimpleNamespace(labels=labels, valid=labels >= 0))
    predictions = SimpleNamespace(logits=[torch.tensor(logits).view(1, 2, 1, 1)])
    teacher = SimpleNamespace(family=SimpleNamespace(dense_head=head), predictions=predictions)
    found = tool.count(student, teacher)
    assert found.other_class == others and found.share_of_other_classes == others


def test_another_method_is_refused_in_one_line(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["disagreement.py", STUDENTS["FCOS"]])
    with pytest.raises(SystemExit):
        tool.main()
    assert capsys.readouterr().err.startswith("error: DISTILL.METHODS is []: give a recipe of Mim")

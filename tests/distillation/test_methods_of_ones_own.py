"""A method with a mistake is told so, in one line, where the mistake would go on as a loss."""

import contextlib

import pytest
import torch
from toys import batch, distill_config, step

from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.methods.core import Distiller, term
from d2kd.schema import Key
from d2kd.views import Features, Reads

LEVELS = 5  # of the RetinaNet
READS = Reads((Features(),), (Features(),))


@contextlib.contextmanager
def registered(method):
    """The registry with one method more, as long as a test runs."""
    DISTILLER_REGISTRY.register(method)
    try:
        yield
    finally:
        del DISTILLER_REGISTRY._obj_map[method.__name__]


def method(returned=None, declared=("feature",), levels=LEVELS):
    """A method of the term "feature" and of "other", which has no weight.

    Args:
        returned: from a loss per level to what ``forward`` returns.
        declared: the terms of ``reads``.
        levels: that it announces.
    """

    class Mine(Distiller):
        keys = {"FEATURE": term(1.0), "OTHER": term(0.0)}

        def __init__(self, node, student, teacher):
            super().__init__(self.enabled_terms(node), num_levels=levels)

        @classmethod
        def reads(cls, node, student, teacher):
            return dict.fromkeys(declared, READS)

        def forward(self, student, teacher, targets):
            return returned(torch.stack([x.square().mean() for x in student.features.values()]))

    return Mine


def losses_of(folder, mine, opts=()):
    with registered(mine):
        return step(
            build_model(distill_config(folder, "RetinaNet", opts, methods=["Mine"])), batch()
        )


@pytest.mark.parametrize(
    "returned, said",
    [
        (lambda x: {}, r"returned the terms none, wanted are 'feature': give"),
        (lambda x: {"Feature": x}, r"returned the terms 'Feature', wanted are 'feature'"),
        (lambda x: {"feature": x, "other": x}, r"returned the terms 'feature', 'other', wanted"),
        (lambda x: None, r"returned None: give a dict from term to tensor, of 'feature'"),
        (lambda x: x, r"returned a Tensor: give a dict"),
        (lambda x: {"feature": list(x)}, r"term 'feature' returned a list: give a tensor"),
        (lambda x: {"feature": 0.5}, r"term 'feature' returned a float: give a tensor"),
        (
            lambda x: {"feature": x[:3]},
            r"term 'feature' returned the shape \(3,\), expected \(5,\)",
        ),
        (
            lambda x: {"feature": x.sum()},
            r"returned the shape \(\), expected \(5,\), one value per",
        ),
        (lambda x: {"feature": x.detach()}, r"term 'feature' returned a loss without gradient"),
    ],
)
def test_what_a_method_returns_is_checked(tmp_path, returned, said):
    with pytest.raises(UserError, match=rf"^Mine\.forward.* {said}"):
        losses_of(tmp_path, method(returned))


def test_a_term_without_levels_is_a_scalar(tmp_path):
    scalar = method(lambda x: {"feature": x.sum()}, levels=0)
    assert losses_of(tmp_path, scalar)["loss_mine_feature"].requires_grad
    with pytest.raises(UserError, match=r"returned the shape \(5,\), expected \(\), a scalar"):
        losses_of(tmp_path, method(lambda x: {"feature": x}, levels=0))


@torch.no_grad()
def test_without_gradients_none_is_asked_for(tmp_path):
    assert "loss_mine_feature" in losses_of(tmp_path, method(lambda x: {"feature": x}))


@pytest.mark.parametrize("declared", [(), ("feature", "other"), ("FEATURE",)])
def test_what_a_method_declares_to_read_is_checked(tmp_path, declared):
    said = r"^Mine.reads declares the terms \[.*\], those with a weight are \['feature'\]: give"
    with pytest.raises(UserError, match=said):
        losses_of(tmp_path, method(declared=declared))


@pytest.mark.parametrize(
    "name, keys, error, said",
    [
        ("Mine", {"feature": term(1.0)}, ValueError, "Mine.keys names 'feature': config keys are"),
        ("Mine", {"X": {"weight": Key(1.0)}}, ValueError, r"Mine.keys\['X'\] names 'weight'"),
        ("Mine", {"FEATURE": 1.0}, TypeError, r"Mine.keys\['FEATURE'\] is 1.0: give a Key"),
        ("Mine", {"BETA": Key(1.0)}, ValueError, "Mine.keys has no loss term"),
        ("Frs", {"FEATURE": term(1.0)}, ValueError, "Frs .* DISTILL.FRS, which is that of FRS"),
        ("Teacher", {"FEATURE": term(1.0)}, ValueError, "DISTILL.TEACHER, which is d2kd's own"),
    ],
)
def test_a_declaration_is_checked_when_it_is_registered(name, keys, error, said):
    before = dict(DISTILLER_REGISTRY)
    with pytest.raises(error, match=said):
        DISTILLER_REGISTRY.register(type(name, (Distiller,), {"keys": keys}))
    assert dict(DISTILLER_REGISTRY) == before

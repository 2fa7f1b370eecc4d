"""The method and the family that the documentation shows work as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from toys import batch, distill_config, step

from d2kd.config import check_config
from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.views import FAMILY_REGISTRY

DOCS = Path(__file__).parent.parent.parent / "docs"


def run_example(page):
    """Runs the first Python block of a page."""
    code = re.search(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)[1]
    exec(compile(code, page, "exec"), {"__name__": "example"})


@pytest.fixture
def my_method():
    run_example("adding-a-method.md")
    yield
    del DISTILLER_REGISTRY._obj_map["MyMethod"]


@pytest.fixture
def my_family():
    run_example("adding-a-detector.md")
    yield
    del FAMILY_REGISTRY._obj_map["ProposalFamily"]


@pytest.mark.parametrize("student", ["RetinaNet", "FasterRCNN"])
def test_the_method_is_one(tmp_path, my_method, student):
    cfg = distill_config(tmp_path, student, methods=["MyMethod"])
    check_config(cfg)
    losses = step(build_model(cfg), batch())
    assert torch.isfinite(losses["loss_mymethod_feature"])
    sum(losses.values()).backward()


def proposal_network(folder):
    """A Faster R-CNN that teaches a ProposalNetwork by all methods that the page names."""
    methods = ["FRS", "PKD", "MGD", "DeFeat", "HGD"]
    opts = ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]
    return distill_config(folder, "FasterRCNN", opts, methods=methods)


def test_without_the_family_its_detector_is_refused(tmp_path):
    with pytest.raises(UserError, match="ProposalNetwork.*cannot be distilled"):
        build_model(proposal_network(tmp_path))


def test_the_family_is_one(tmp_path, my_family):
    model = build_model(proposal_network(tmp_path))
    losses = step(model, batch())
    assert {"loss_frs_cls", "loss_pkd_feature", "loss_hgd_feature"} < set(losses)
    assert all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.student.backbone.parameters())

"""The Python that the documentation shows works as it stands there."""

import json
import re
from pathlib import Path

import pytest
import torch
from toys import STUDENTS, batch, detector, distill_config, step

from d2kd.config import check_config
from d2kd.distillation import build_model
from d2kd.errors import UserError
from d2kd.methods import DISTILLER_REGISTRY
from d2kd.views import FAMILY_REGISTRY, build_family

DOCS = Path(__file__).parent.parent.parent / "docs"


def run_example(page, number=0):
    """Runs a Python block of a page; returns the names that it makes."""
    code = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)[number]
    names = {"__name__": "example"}
    exec(compile(code, page, "exec"), names)
    return names


def test_one_file_of_annotations_becomes_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [{"id": 10 * i, "file_name": f"{i}.jpg"} for i in range(11)]
    annotations = [{"id": i, "image_id": 10 * (i // 3)} for i in range(30)]  # the last image: none
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    Path("all.json").write_text(json.dumps(content))
    run_example("own-data.md")
    train, val = (json.loads(Path(f"{name}.json").read_text()) for name in ("train", "val"))
    assert (len(train["images"]), len(val["images"])) == (9, 2)
    for key in ("images", "annotations"):
        both = sorted([*train[key], *val[key]], key=lambda x: x["id"])
        assert both == content[key]
    for part in (train, val):
        assert part["categories"] == content["categories"]
        assert {x["image_id"] for x in part["annotations"]} <= {x["id"] for x in part["images"]}


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


def test_its_check_of_a_pair_refuses_other_anchors(my_method):
    check = run_example("adding-a-method.md", 1)["check_pair"].__func__
    mine = DISTILLER_REGISTRY.get("MyMethod")
    retinanet, fcos = (build_family(detector(STUDENTS[x])) for x in ("RetinaNet", "FCOS"))
    check(mine, None, retinanet, retinanet)
    with pytest.raises(UserError, match="DISTILL.MYMETHOD compares predictions one by one: .* of"):
        check(mine, None, fcos, retinanet)


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

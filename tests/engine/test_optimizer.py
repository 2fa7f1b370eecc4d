"""What the optimizer does to which parameter."""

import pytest
import torch
from detectron2.solver import build_optimizer
from toys import batch, config, distill_config, step

from d2kd.distillation import build_model
from d2kd.engine import DistillTrainer
from d2kd.errors import UserError

TEMPERATURE = "distillers.GDetKD.imitation.log_temperature"
KEY = "DISTILL.GDETKD."


def model_and_optimizer(folder, name, opts=(), methods=("GDetKD",)):
    opts = ["SOLVER.OPTIMIZER", name, "SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.BASE_LR", 0.1, *opts]
    small = [KEY + "QUEUE_SIZE", 8, "SOLVER.WEIGHT_DECAY_NORM", 0.25]
    cfg = distill_config(folder, "FasterRCNN", [*small, *opts], methods=methods)
    model = build_model(cfg)
    return model, DistillTrainer.build_optimizer(cfg, model), cfg


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_temperature_does_not_decay(tmp_path, name, clip):
    opts = ["SOLVER.CLIP_GRADIENTS.ENABLED", clip]
    model, optimizer, _ = model_and_optimizer(tmp_path, name, opts)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in model.named_parameters():
        if p.requires_grad and before[n].abs().sum() > 0:
            assert torch.equal(p, before[n]) == (n == TEMPERATURE), n


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("waiting", [["FEATURE"], ["FEATURE", "CLS"]])
def test_adapters_wait_unchanged_for_their_term(tmp_path, name, waiting):
    start = [x for term in waiting for x in (f"DISTILL.FRS.{term}.START_ITER", 1)]
    model, optimizer, _ = model_and_optimizer(tmp_path, name, start, methods=("FRS", "PKD"))
    adapters = model.distillers["FRS"].adapters
    before = [p.detach().clone() for p in adapters.parameters()]
    for iteration in range(2):
        optimizer.zero_grad()
        sum(step(model, batch(), iteration).values()).backward()
        optimizer.step()
        unchanged = [torch.equal(*pair) for pair in zip(before, adapters.parameters())]
        assert all(unchanged) if iteration == 0 else not any(unchanged)


def test_what_one_batch_of_a_step_trains_is_trained(tmp_path):
    start = ["DISTILL.FRS.FEATURE.START_ITER", 1]
    model, optimizer, _ = model_and_optimizer(tmp_path, "SGD", start, methods=("FRS",))
    adapters = model.distillers["FRS"].adapters
    before = [p.detach().clone() for p in adapters.parameters()]
    for iteration in (1, 0):  # the second batch does not reach them
        sum(step(model, batch(), iteration).values()).backward()
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, adapters.parameters()))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_all_else_is_as_without_the_exception(tmp_path, monkeypatch, name):
    def groups(optimizer, model):
        names = {p: n for n, p in model.named_parameters()}
        found = [
            (names[p], {k: v for k, v in group.items() if k != "params"})
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        assert len(found) == len(dict(found))
        return dict(found)

    model, optimizer, cfg = model_and_optimizer(tmp_path, name)
    found = groups(optimizer, model)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    monkeypatch.setattr(type(model.distillers["GDetKD"]), "no_weight_decay", lambda _: set())
    plain = groups(DistillTrainer.build_optimizer(cfg, model), model)
    assert found.pop(TEMPERATURE) == {**plain.pop(TEMPERATURE), "weight_decay": 0.0}
    assert found == plain
    if name == "SGD":
        stock = groups(build_optimizer(cfg, model), model)
        stock.pop(TEMPERATURE)
        assert found == stock


def test_without_exceptions_the_groups_are_detectron2s(tmp_path):
    model, optimizer, cfg = model_and_optimizer(tmp_path, "SGD", methods=["FRS"])
    for ours, stock in zip(optimizer.param_groups, build_optimizer(cfg, model).param_groups):
        assert [id(p) for p in ours["params"]] == [id(p) for p in stock["params"]]
        assert {**ours, "params": 0} == {**stock, "params": 0}
    assert len(optimizer.param_groups) == len(build_optimizer(cfg, model).param_groups)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_norm_of_all_gradients_together_is_clipped(tmp_path, name):
    clip = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 2.0]
    opts = [*clip, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"]
    model, optimizer, cfg = model_and_optimizer(tmp_path, name, opts, methods=["FRS"])
    _, plain, _ = model_and_optimizer(tmp_path, name, methods=["FRS"])
    # "foreach" is set by newer versions of Detectron2, and says how, not what is computed.
    ours, stock = (
        [{k: v for k, v in g.items() if k not in ("params", "foreach")} for g in x.param_groups]
        for x in (optimizer, plain)
    )
    assert ours == stock
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).norm()
    assert total.item() == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["SOLVER.BASE_LR", -1.0], "the optimizer that SOLVER describes cannot be built: .*-1.0"),
        (["SOLVER.WEIGHT_DECAY_BIAS", ""], "SOLVER.WEIGHT_DECAY_BIAS is '', expected a number"),
        (["SOLVER.LR_SCHEDULER_NAME", "x"], "the schedule of the learning rate that SOLVER .*x"),
    ],
)
def test_what_torch_or_detectron2_refuse_is_one_line(tmp_path, opts, words):
    cfg = config("shapes/baselines/fcos_tiny.yaml", opts)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=words):
        DistillTrainer.build_lr_scheduler(cfg, DistillTrainer.build_optimizer(cfg, model))

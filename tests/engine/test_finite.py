"""A loss that is not finite: who was first is said in one line, and no such weights are saved."""

import pytest
import torch
from detectron2.utils import comm
from runs import run_config, train
from toys import batch, distill_config

from d2kd.distillation import build_model
from d2kd.engine.finite import FiniteLosses, _Pass
from d2kd.errors import UserError

NAN, INF = float("nan"), float("inf")


def poison_weight(trainer):
    trainer.bare_model.teacher.detector.backbone.fpn_output3.weight.data.fill_(NAN)


def huge_teacher(trainer):
    trainer.bare_model.teacher.detector.backbone.fpn_output3.weight.data.fill_(3e38)


def huge_student(trainer):
    trainer.student.head.bbox_pred.weight.data.fill_(3e38)


def gradient(trainer):
    parameter = trainer.student.head.cls_score.bias
    parameter.register_hook(lambda g: g * INF)


def adapter(trainer):
    next(trainer.bare_model.distillers.parameters()).data.fill_(NAN)


class Overflowing(torch.nn.Module):
    """In float16 its layer gives infinity, in float32 65 600."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        self.layer.weight.data.fill_(65600.0)

    def forward(self, inputs):
        return {"loss": self.layer(torch.ones(1, 1)).sum()}


def test_an_overflow_in_half_precision_is_found_in_it():
    model = Overflowing()
    watch = FiniteLosses(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.autocast("cpu", torch.float16):
        model([])
    with pytest.raises(UserError, match=r"module layer\); .* or SOLVER.AMP.ENABLED False"):
        watch.check()


def test_what_a_method_has_not_measured_yet_is_not_blamed(tmp_path):
    cfg = distill_config(tmp_path, "RetinaNet", methods=["HGD"])
    model = build_model(cfg)
    assert model.distillers["HGD"].scales.isnan().all()
    watch = FiniteLosses(model, torch.optim.SGD(model.student.parameters(), lr=0.1))
    watch._passes.append(_Pass((batch(),), None, {}, {}))  # one that ended in some other error
    assert watch.origin() is None


@pytest.mark.parametrize(
    "action, iteration, words",
    [
        (poison_weight, 2, "the teacher's backbone.fpn_output3.weight is not finite"),
        (huge_teacher, 2, "the teacher's output was the first .*module backbone.fpn"),
        (huge_student, 2, "the student's output was the first .*module head.bbox_pred"),
        (gradient, 3, "the student's head.cls_score.bias is not finite since the step before"),
        (adapter, 2, "the method's .* is not finite since"),
    ],
)
def test_who_was_first(tmp_path, toy_dataset, action, iteration, words, caplog):
    cfg = run_config(tmp_path, "FCOS", toy_dataset, ["SOLVER.CHECKPOINT_PERIOD", 100])
    with pytest.raises(UserError, match=words) as error:
        train(cfg, at=2, action=action)
    assert str(error.value).startswith(f"iteration {iteration}: ")
    assert "\n" not in str(error.value) and "Traceback" not in caplog.text


def test_the_levels_of_a_term_are_named(tmp_path, toy_dataset):
    cfg = run_config(tmp_path, "FCOS", toy_dataset)
    with pytest.raises(UserError, match=r"loss_frs_feature is nan \(on levels \[\d"):
        train(cfg, at=1, action=poison_weight)


def test_an_image_that_is_not_finite_is_named(tmp_path, toy_dataset):
    def spoil(model, inputs):
        image = inputs[0][1]
        image["image"] = image["image"].float().fill_(NAN)

    def poison(trainer):
        trainer.bare_model.register_forward_pre_hook(spoil)

    cfg = run_config(tmp_path, "FCOS", toy_dataset)
    with pytest.raises(UserError, match="iteration 1: .*image .*toy/train.*jpg is not finite"):
        train(cfg, at=1, action=poison)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, toy_dataset):
    cfg = run_config(tmp_path, "FCOS", toy_dataset, ["SOLVER.CHECKPOINT_PERIOD", 1])
    with pytest.raises(UserError, match="iteration 2: .*is not finite"):
        train(cfg, at=2, action=gradient)
    assert train(cfg, resume=True).start_iter == 2
    for name in ("model_0000001", "model_final"):
        saved = torch.load(f"{cfg.OUTPUT_DIR}/{name}.pth", weights_only=True)["model"]
        assert all(tensor.isfinite().all() for tensor in saved.values())


def test_losses_are_looked_at_once_in_a_step():
    model = torch.nn.Linear(1, 1)
    model.forward = lambda inputs: {"loss": loss}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = FiniteLosses(model, optimizer)
    loss = torch.tensor(1.0)
    model([])
    optimizer.step()
    loss.fill_(NAN)
    watch.check()  # it was finite before the step, and is not asked for again
    model([])
    with pytest.raises(UserError, match="loss is nan"):  # no optimizer's step: mixed precision
        watch.check()


def test_several_processes_do_not_run_the_model_again(monkeypatch):
    """The others wait elsewhere, and would not answer."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    model, calls = torch.nn.Linear(1, 1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = FiniteLosses(model, optimizer)
    model.register_forward_hook(lambda *_: calls.append(1))
    losses._passes.append(
        _Pass(([{"image": torch.zeros(1)}],), None, {"loss": torch.tensor(NAN)}, {})
    )
    with pytest.raises(UserError, match="loss is nan: images and weights are finite .*one process"):
        losses.check()
    assert not calls

"""Several batches in one optimizer step: the mean of their gradients, and a run like any other."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from runs import assert_same_run, run_config, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import batch, config, detector

from d2kd.engine.accumulation import accumulated_step
from d2kd.engine.hooks import CostHook
from d2kd.errors import UserError

TWO = ["SOLVER.ACCUMULATION_STEPS", 2]


class Regression(nn.Module):
    """Its loss is a mean over samples, so that equal parts of a batch have equal shares."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, samples):
        values = samples @ self.weight
        return {"loss_square": values.square().mean(), "loss_cube": values.abs().pow(3).mean()}


def samples(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained(trainer, batches, steps=3):
    """The trainer and the losses that it has logged."""
    logged = []
    with EventStorage(0) as storage:
        for trainer.iter in range(steps):
            storage.iter = trainer.iter
            accumulated_step(trainer, batches)
            logged.append({k: v for k, (v, _) in storage.latest().items() if "loss" in k})
    return trainer, logged


def test_parts_of_a_batch_are_the_batch():
    parts = SimpleTrainer(model := Regression(), iter(samples(36).split(3)), sgd(model))
    parts, ours = trained(parts, 4)
    whole = SimpleTrainer(model := Regression(), iter(samples(36).split(12)), sgd(model))
    theirs = []
    with EventStorage(0) as storage:
        for whole.iter in range(3):
            storage.iter = whole.iter
            whole.run_step()
            theirs.append({k: v for k, (v, _) in storage.latest().items() if "loss" in k})
    torch.testing.assert_close(parts.model.weight, whole.model.weight, rtol=1e-12, atol=0)
    for mine, stock in zip(ours, theirs):
        assert mine == pytest.approx(stock, rel=1e-6) and "total_loss" in mine


def test_a_detector_gets_the_mean_of_the_gradients():
    model = detector("shapes/baselines/fcos_tiny.yaml").train()
    batches = [batch(seed=seed) for seed in range(3)]
    parameters, parts = list(model.parameters()), []
    for inputs in batches:
        with EventStorage(0):
            gradient = torch.autograd.grad(sum(model(inputs).values()), parameters)
        parts.append(torch.cat([g.flatten() for g in gradient]))
    del model.loss_normalizer  # a moving average, which begins with the first pass
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    trained(SimpleTrainer(model, iter(batches), optimizer), len(parts), steps=1)
    found, mean = torch.cat([p.grad.flatten() for p in parameters]), sum(parts) / len(parts)
    # By element the gradients before a norm are noise around zero
    assert (found - mean).norm() < 1e-4 * mean.norm() < 1e-3 * parts[0].norm()


def test_mixed_precision_scales_once_and_skips_a_step_as_it_does():
    def run(batches):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        model = Regression()
        return trained(
            AMPTrainer(model, iter(batches), sgd(model), grad_scaler=scaler), 4, len(batches) // 4
        )

    amp, _ = run(samples(36).split(3))
    plain = SimpleTrainer(model := Regression(), iter(samples(36).split(3)), sgd(model))
    plain, _ = trained(plain, 4)
    assert torch.equal(amp.model.weight, plain.model.weight)
    overflow = [*samples(9).split(3), torch.full((3, 4), 1e103, dtype=torch.float64)]
    amp, _ = run(overflow)
    assert torch.equal(amp.model.weight, Regression().weight)
    assert amp.grad_scaler.get_scale() == 512.0


def worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(Regression())
    exchanges = []

    def count(state, bucket):
        exchanges.append(bucket.index())
        future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    model.register_comm_hook(None, count)
    data = samples(36, seed=rank).split(3)
    trainer, _ = trained(SimpleTrainer(model, iter(data), sgd(model)), 4)
    torch.save((trainer.model.module.weight, len(exchanges)), os.path.join(folder, f"{rank}.pth"))
    dist.destroy_process_group()


def test_processes_exchange_gradients_once_per_step(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    (ours, exchanges), (theirs, _) = (torch.load(tmp_path / f"{r}.pth") for r in range(2))
    parts = zip(samples(36, seed=0).split(12), samples(36, seed=1).split(12))
    model = Regression()
    alone = SimpleTrainer(model, iter([torch.cat(pair) for pair in parts]), sgd(model))
    trained(alone, 1)
    assert exchanges == 3 and torch.equal(ours, theirs)
    torch.testing.assert_close(ours, model.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("student", ["FCOS", "FasterRCNN"])
def test_killed_and_resumed_ends_as_one_that_was_not(tmp_path, toy_dataset, student):
    whole = run_config(tmp_path / "whole", student, toy_dataset, TWO)
    train(whole)
    cfg = run_config(tmp_path / "killed", student, toy_dataset, TWO)
    train(cfg, at=4)
    assert train(cfg, resume=True).start_iter == 3
    assert_same_run(whole, cfg)


def test_a_step_takes_its_batches_one_after_the_other(tmp_path, toy_dataset):
    seen = []

    def note(trainer):
        trainer.bare_model.register_forward_pre_hook(
            lambda _, inputs: seen.append((trainer.iter, [x["file_name"] for x in inputs[0]]))
        )

    cfg = run_config(tmp_path, "FCOS", toy_dataset, [*TWO, "DATASETS.TEST", "()"])
    trainer = train(cfg, at=0, action=note)
    assert [i for i, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    trainer.data_loader.start_iter = 0
    assert [names for _, names in seen] == [
        [x["file_name"] for x in inputs] for inputs, _ in zip(trainer.data_loader, seen)
    ]


@pytest.mark.parametrize("position", [0, 1])
def test_a_loss_that_is_not_finite_is_found_in_every_batch(tmp_path, toy_dataset, position):
    def poison(trainer):
        passes = itertools.count()

        def fill(model, inputs):
            if next(passes) == position:
                image = inputs[0][1]["image"]
                inputs[0][1]["image"] = torch.full_like(image, float("nan"), dtype=torch.float32)

        trainer.bare_model.register_forward_pre_hook(fill)

    cfg = run_config(tmp_path, "FCOS", toy_dataset, TWO)
    with pytest.raises(UserError, match="iteration 1: .*image .*toy/train.*jpg is not finite"):
        train(cfg, at=1, action=poison)


def test_times_are_those_of_a_step():
    class Watch:
        def seconds(self):
            return {"teacher": 0.5}

    class Trainer:
        iter = 19

    model = nn.Module()
    model.step_times = [Watch(), Watch()]
    hook = CostHook(model, batches=3)
    hook.trainer = Trainer()
    with EventStorage(19) as hook.trainer.storage:
        hook.after_step()
        assert hook.trainer.storage.latest()["teacher_time"][0] == 1.5


def test_no_batch_at_all_is_refused():
    with pytest.raises(UserError, match="SOLVER.ACCUMULATION_STEPS is 0: give 1 or more"):
        config("shapes/baselines/fcos_tiny.yaml", ["SOLVER.ACCUMULATION_STEPS", 0])

"""Two processes on a CPU: DistributedDataParallel accepts the model as it is."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from toys import batch, distill_config, gradients, step

from d2kd.distillation import build_model


def worker(rank, cfg, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(build_model(cfg), broadcast_buffers=False)
    for iteration in (0, 1000):
        losses = step(model, batch(seed=rank), iteration)
        sum(losses.values()).backward()
    torch.save(gradients(model.module), os.path.join(folder, f"{rank}.pth"))
    dist.destroy_process_group()


@pytest.mark.parametrize("student", ["FCOS", "FasterRCNN"])
def test_gradients_are_averaged_without_unused_parameters(tmp_path, student):
    # One term starts later: its adapters have nothing to do in the first step.
    cfg = distill_config(tmp_path, student, ["DISTILL.FRS.FEATURE.START_ITER", 500])
    mp.spawn(worker, (cfg, str(tmp_path)), nprocs=2)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert any("distillers" in k and g.abs().sum() > 0 for k, g in ours.items())

"""G-DetKD in two processes on a CPU: the memory is shared, and nobody waits for another."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from test_gdetkd_distiller import distilled
from torch.nn.parallel import DistributedDataParallel
from toys import batch, distill_config, gradients, step

from d2kd.methods.contrastive import RegionContrast
from d2kd.modeling import build_model


def spawn(worker, folder, *args):
    """Runs worker(rank, folder, *args) in two processes; returns what each of them returned."""
    mp.spawn(_entry, (str(folder), worker, args), nprocs=2)
    return [torch.load(folder / f"result{rank}.pth", weights_only=False) for rank in range(2)]


def _entry(rank, folder, worker, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(worker(rank, *args), os.path.join(folder, f"result{rank}.pth"))
    dist.destroy_process_group()


def regions(sizes, seed=0):
    """Student and teacher vectors and boxes of one image per entry of sizes."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for size in sizes:
        corner = torch.rand(size, 2, generator=generator) * 20
        boxes = Boxes(torch.cat([corner, corner + 20], dim=1))
        vectors = [torch.randn(size, d, generator=generator) for d in (5, 6)]
        images.append((*vectors, boxes))
    return images


def contrast(images, **options):
    """Three steps, the last with gradient: loss, gradients and memory."""
    torch.manual_seed(0)
    module = RegionContrast(5, 6, proj_dim=4, queue_size=20, **options)
    student, teacher, boxes = zip(*images)
    classes = [torch.zeros(len(b), dtype=torch.long) for b in boxes]
    with EventStorage(19):
        for _ in range(3):
            module.zero_grad()
            loss = module(torch.cat(student), torch.cat(teacher), list(boxes), classes)
            loss.backward()
    return loss.detach(), gradients(module), module.memory.vectors


# (sizes of the two images, options)
EQUAL = [((7, 7), {}), ((7, 7), {"queue_raw": True}), ((7, 7), {"positive_in_denominator": False})]
UNEQUAL = [((0, 4), {}), ((4, 0), {}), ((0, 0), {}), ((1, 3), {})]


def contrasts_of_rank(rank, cases):
    return [contrast([regions(sizes)[rank]], **options) for sizes, options in cases]


def test_two_processes_equal_one_with_both_images(tmp_path):
    """Overlaps are within an image, so nothing is local but the normaliser: it is the same where
    both have as many regions. Where they have not, the memory still is."""
    results = zip(*spawn(contrasts_of_rank, tmp_path, EQUAL + UNEQUAL))
    for (sizes, options), ranks in zip(EQUAL + UNEQUAL, results):
        loss, grads, memory = contrast(regions(sizes), **options)
        for size, (their_loss, their_grads, their_memory) in zip(sizes, ranks):
            assert torch.allclose(their_memory, memory, atol=1e-6)
            assert all(x.isfinite().all() for x in (their_loss, *their_grads.values()))
            assert size or their_loss == 0
        if (sizes, options) in EQUAL:
            assert torch.allclose(sum(r[0] for r in ranks) / 2, loss, atol=1e-6)
            for name, expected in grads.items():
                mean = sum(r[1][name] for r in ranks) / 2
                assert torch.allclose(mean, expected, atol=1e-6)


def train(rank, cfg, boxes):
    torch.manual_seed(0)
    model = DistributedDataParallel(build_model(cfg), broadcast_buffers=False)
    for iteration in (0, 1000):
        terms = step(model, batch(seed=rank, boxes=boxes[rank]), iteration, seed=rank)
        sum(terms.values()).backward()
    return (
        {k: v.detach() for k, v in distilled(terms).items()},
        gradients(model.module),
        {k: v.clone() for k, v in model.module.distillers.state_dict().items() if "memory" in k},
    )


@pytest.mark.parametrize(
    "student, opts",
    [
        ("FasterRCNN", []),
        ("FCOS", []),
        ("FasterRCNN", ["DISTILL.GDETKD.FOREGROUND_ONLY", True]),
        ("FasterRCNN", ["DISTILL.GDETKD.DETACH_ALPHA", True]),
    ],
)
def test_gradients_are_averaged_and_memories_equal(tmp_path, student, opts):
    """One process has no objects and, of these alone, no regions; one term starts later."""
    opts = [*opts, "DISTILL.GDETKD.QUEUE_SIZE", 500, "DISTILL.GDETKD.SGFI.START_ITER", 500]
    if student == "FCOS":
        opts += ["DISTILL.GDETKD.CLS.WEIGHT", 0.0, "DISTILL.GDETKD.BBOX.WEIGHT", 0.0]
    cfg = distill_config(tmp_path, student, opts, teacher="FasterRCNN", methods=["GDetKD"])
    (ours, grads, memory), (_, other_grads, other) = spawn(train, tmp_path, cfg, [[[], []], None])
    assert all(v.isfinite() for v in ours.values())
    assert all(torch.equal(grads[k], other_grads[k]) for k in grads)
    assert any("distillers" in k and g.abs().sum() > 0 for k, g in grads.items())
    for name, vectors in memory.items():
        assert torch.equal(vectors, other[name]) and vectors.abs().sum() > 0

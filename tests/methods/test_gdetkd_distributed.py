"""G-DetKD in two processes on a CPU: the queue is shared, and nobody waits for another."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.structures import Boxes
from gdetkd_cases import KEY, PREDICTIONS_OFF, distilled, region_contrast
from torch.nn.parallel import DistributedDataParallel
from toys import batch, distill_config, gradients, step

from d2kd.distillation import build_model
from d2kd.views import RegionSet


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
    """Three steps, the last with gradient: loss, gradients and queue."""
    torch.manual_seed(0)
    module = region_contrast(5, 6, **{"proj_dim": 4, "queue_size": 20, **options})
    student, teacher, boxes = zip(*images)
    regions = RegionSet(boxes, [torch.zeros(len(b), dtype=torch.long) for b in boxes])
    for _ in range(3):
        module.zero_grad()
        loss, diagnostics = module(torch.cat(student), torch.cat(teacher), regions)
        assert all(x.isfinite() for x in diagnostics().values())
        loss.backward()
    return loss.detach(), gradients(module), module.queue.vectors


# (sizes of the two images, options)
CASES = [((7, 7), {}), ((7, 7), {"proj_dim": 0}), ((7, 7), {"positive_in_denominator": False})]
CASES += [((0, 4), {}), ((4, 0), {}), ((0, 0), {}), ((1, 3), {})]


def contrasts_of_rank(rank, cases):
    return [contrast([regions(sizes)[rank]], **options) for sizes, options in cases]


def test_two_processes_equal_one_with_both_images(tmp_path):
    """Overlaps are within an image, so nothing is local but the normaliser, the number of
    regions."""
    results = zip(*spawn(contrasts_of_rank, tmp_path, CASES))
    for (sizes, options), ranks in zip(CASES, results):
        loss, grads, queue = contrast(regions(sizes), **options)
        shares = [size / max(sum(sizes), 1) for size in sizes]
        for size, (their_loss, their_grads, their_queue) in zip(sizes, ranks):
            assert torch.allclose(their_queue, queue, atol=1e-6)
            assert all(x.isfinite().all() for x in (their_loss, *their_grads.values()))
            assert size or their_loss == 0
        assert torch.allclose(sum(w * r[0] for w, r in zip(shares, ranks)), loss, atol=1e-6)
        for name, expected in grads.items():
            mean = sum(w * r[1][name] for w, r in zip(shares, ranks))
            assert torch.allclose(mean, expected, atol=1e-6)


PAIRS = {
    "two-stage": ("FasterRCNN", []),
    "dense": ("FCOS", [*PREDICTIONS_OFF, KEY + "DENSE.ROIS_PER_IMAGE", 64]),
    "objects alone": ("FasterRCNN", [KEY + "FOREGROUND_ONLY", True]),
    "teacher's levels": ("FasterRCNN", [KEY + "AGGREGATE", "teacher"]),
}


def train(rank, cfgs, boxes):
    results = {}
    for name, cfg in cfgs.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(build_model(cfg), broadcast_buffers=False)
        for iteration in (0, 1000):
            terms = step(model, batch(seed=rank, boxes=boxes[rank]), iteration, seed=rank)
            sum(terms.values()).backward()
        state = model.module.distillers.state_dict()
        results[name] = (
            {k: v.detach() for k, v in distilled(terms).items()},
            gradients(model.module),
            {k: v.clone() for k, v in state.items() if "queue" in k},
        )
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of every pair, what both processes end with. One process has no objects and, of these alone,
    no regions; one term starts later."""
    folder = tmp_path_factory.mktemp("gdetkd")
    common = [KEY + "QUEUE_SIZE", 500, KEY + "SGFI.START_ITER", 500]
    options = {"teacher": "FasterRCNN", "methods": ["GDetKD"]}
    cfgs = {
        name: distill_config(folder, student, [*common, *opts], **options)
        for name, (student, opts) in PAIRS.items()
    }
    return spawn(train, folder, cfgs, [[[], []], None])


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_averaged_and_queues_equal(trained, name):
    (ours, grads, queue), (_, other_grads, other) = (results[name] for results in trained)
    assert set(ours) >= {"sgfi", "ckd"} and all(v.isfinite() for v in ours.values())
    assert all(torch.equal(grads[k], other_grads[k]) for k in grads)
    assert any("distillers" in k and g.abs().sum() > 0 for k, g in grads.items())
    assert queue
    for key, vectors in queue.items():
        assert torch.equal(vectors, other[key]) and vectors.abs().sum() > 0

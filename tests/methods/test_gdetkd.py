"""G-DetKD's formulas: hand-computed cases, invariances, gradients, and the queue."""

import pytest
import torch
from detectron2.structures import Boxes
from gdetkd_cases import region_contrast
from host_syncs import HostSyncs
from torch import nn
from torch.nn import functional as F

from d2kd.layers import gather_over_gpus
from d2kd.methods.gdetkd import (
    class_aware_localization,
    contrast,
    contrastive_loss,
    match_levels,
)
from d2kd.methods.gdetkd.contrast import overlapping, similarity
from d2kd.methods.gdetkd.predictions import classification_kl
from d2kd.methods.gdetkd.queue import VectorQueue
from d2kd.views import RegionSet

KEYS = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])[:, None]
TEACHER_KEY = torch.tensor([[1.0, 0.2]])
VALUES = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])

QUERIES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
TARGETS = torch.tensor([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0]])
QUEUE = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
BOXES = Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30]]))
NONE = torch.zeros(3, 3, dtype=torch.bool)


def units(generator, *shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


@pytest.mark.parametrize(
    "temperature, weights, mse",
    [
        (1.0, [0.471776, 0.316241, 0.211983], 0.0348893),
        (0.1, [0.981690, 0.017980, 0.000329], 0.9627465),
    ],
)
def test_match_by_hand(temperature, weights, mse):
    found = match_levels(KEYS, TEACHER_KEY, temperature)
    assert torch.allclose(found[:, 0], torch.tensor(weights), atol=1e-6)
    merged = found.t() @ VALUES
    assert (merged - 1).square().mean().item() == pytest.approx(mse, rel=1e-5)


def test_match_sums_to_one_over_levels_and_permutes():
    generator = torch.Generator().manual_seed(0)
    keys, teacher = torch.randn(5, 7, 4, generator=generator), torch.randn(7, 4)
    found = match_levels(keys, teacher, 0.7)
    assert found.shape == (5, 7)
    assert torch.allclose(found.sum(dim=0), torch.ones(7))
    levels, regions = torch.randperm(5), torch.randperm(7)
    assert torch.allclose(match_levels(keys[levels], teacher, 0.7), found[levels])
    assert torch.allclose(match_levels(keys[:, regions], teacher[regions], 0.7), found[:, regions])
    assert torch.equal(match_levels(keys[:1], teacher, 0.7), torch.ones(1, 7))
    assert match_levels(keys[:, :0], teacher[:0], 0.7).shape == (5, 0)


@pytest.mark.parametrize(
    "excluded, in_denominator, expected, mean",
    [
        (overlapping([BOXES], 0.5), True, [1.001016, 0.253856, 1.547091], 0.933988),
        (overlapping([BOXES], 0.5), False, [0.542932, -1.241376, 1.307734], 0.203097),
        (NONE, True, None, 1.057533),
    ],
)
def test_contrast_by_hand(excluded, in_denominator, expected, mean):
    loss = contrastive_loss(QUERIES, TARGETS, excluded, QUEUE, 0.5, in_denominator)
    assert loss.mean().item() == pytest.approx(mean, abs=1e-6)
    if expected:
        assert torch.allclose(loss, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("in_denominator", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_contrast_equals_a_loop(monkeypatch, chunk, in_denominator):
    monkeypatch.setattr(contrast, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    queries = units(generator, 6, 3, dtype=torch.float64).requires_grad_()
    keys = units(generator, 9, 3, dtype=torch.float64).requires_grad_()
    queue = units(generator, 11, 3, dtype=torch.float64)
    queue[:2] = 0  # never filled
    excluded = torch.rand(6, 9, generator=generator) < 0.4
    loss = contrastive_loss(queries, keys, excluded, queue, 0.07, in_denominator)
    naive = []
    for i in range(6):
        own = (queries[i] @ keys[i] / 0.07).exp()
        others = [j for j in range(9) if j != i and not excluded[i, j]]
        negatives = sum((queries[i] @ keys[j] / 0.07).exp() for j in others)
        negatives = negatives + sum((queries[i] @ k / 0.07).exp() for k in queue[2:])
        naive.append(-(own / (negatives + own * in_denominator)).log())
    naive = torch.stack(naive)
    assert torch.allclose(loss, naive)
    found = torch.autograd.grad(loss.square().sum(), (queries, keys))
    for got, expected in zip(found, torch.autograd.grad(naive.square().sum(), (queries, keys))):
        assert torch.allclose(got, expected)


@pytest.mark.parametrize("in_denominator", [True, False])
def test_contrast_of_regions_is_that_of_their_projections(in_denominator):
    torch.manual_seed(0)
    options = {"proj_dim": 4, "gamma": 0.3, "queue_size": 0}
    module = region_contrast(5, 6, positive_in_denominator=in_denominator, **options)
    student, teacher = torch.randn(3, 5), torch.randn(3, 6)
    loss, _ = module(student, teacher, RegionSet([BOXES], [torch.zeros(3).long()]))
    vectors = (module.projection(x) for x in (module.adapter(student), teacher))
    queries, keys = (F.normalize(x, dim=1) for x in vectors)
    excluded = overlapping([BOXES], 0.5)
    expected = contrastive_loss(queries, keys, excluded, QUEUE[:0], 0.3, in_denominator)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_without_a_projection_the_adapter_is_one_without_bias():
    assert region_contrast(6, 6, proj_dim=0, queue_size=0).adapter.bias is None
    assert isinstance(region_contrast(6, 6, proj_dim=8, queue_size=0).adapter, nn.Identity)


def test_contrast_ignores_order_and_overlapping_copies():
    order = torch.tensor([2, 0, 1])
    excluded = overlapping([BOXES], 0.5)
    loss = contrastive_loss(QUERIES, TARGETS, excluded, QUEUE, 0.5)
    permuted = contrastive_loss(
        QUERIES[order], TARGETS[order], excluded[order][:, order], QUEUE.flip(0), 0.5
    )
    assert torch.allclose(permuted, loss[order])
    copied = torch.tensor([0, 1, 2, 0])
    excluded = overlapping([BOXES[copied]], 0.5)
    again = contrastive_loss(QUERIES[copied], TARGETS[copied], excluded, QUEUE, 0.5)
    assert torch.allclose(again[0], loss[0])


@pytest.mark.parametrize("in_denominator", [True, False])
@pytest.mark.parametrize("num, places", [(0, 0), (0, 5), (1, 0), (1, 5), (3, 0)])
def test_contrast_is_finite_without_negatives(num, places, in_denominator):
    queries = units(torch.Generator().manual_seed(0), num, 4).requires_grad_()
    excluded = torch.ones(num, num, dtype=torch.bool)
    loss = contrastive_loss(
        queries, queries.detach(), excluded, torch.zeros(places, 4), 0.07, in_denominator
    )
    assert torch.equal(loss, torch.zeros(num))
    loss.sum().backward()
    assert torch.equal(queries.grad, torch.zeros_like(queries))


def test_the_queue_needs_one_chunk_of_logits(monkeypatch):
    """Whatever its size, no tensor over the whole queue is kept for the backward pass."""
    monkeypatch.setattr(contrast, "_CHUNK", 16)
    queries = units(torch.Generator().manual_seed(0), 4, 8).requires_grad_()
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    queue = units(torch.Generator().manual_seed(1), 4096, 8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        contrastive_loss(queries, queries.detach(), torch.eye(4).bool(), queue, 0.07)
    assert max(kept) <= 4 * 8


def hits(size, excluded, queue):
    return similarity(QUERIES[:size], TARGETS[:size], excluded, queue, 0.5).hits().tolist()


def test_hits():
    # The first is nearer to the third key, the third to the first: only the second hits.
    assert hits(3, NONE, QUEUE) == [False, True, False]
    closer = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert hits(3, NONE, closer) == [False] * 3
    excluded = ~torch.eye(3, dtype=torch.bool)
    assert hits(3, excluded, QUEUE) == hits(3, excluded, QUEUE[:0]) == [True] * 3
    assert hits(0, NONE[:0, :0], QUEUE) == []


def test_keys_of_zeros_are_no_negatives():
    """Nor does a region that only fills up count, on either side."""
    padding = torch.zeros(2, 2)
    keys, queries = torch.cat([TARGETS, padding]), torch.cat([QUERIES, padding])
    excluded = torch.zeros(5, 5, dtype=torch.bool)
    loss = contrastive_loss(queries, keys, excluded, QUEUE, 0.5)
    assert torch.allclose(loss[:3], contrastive_loss(QUERIES, TARGETS, NONE, QUEUE, 0.5))

    module = region_contrast(2, 2, proj_dim=0, gamma=0.5, negative_iou=1.0, queue_size=4)
    boxes = [Boxes(torch.zeros(5, 4))]
    valid = torch.tensor([True] * 3 + [False] * 2)
    regions = RegionSet(boxes, [torch.zeros(5).long()], valid=valid)
    torch.nn.init.eye_(module.adapter.weight)
    filled, numbers = module(queries + 1, keys + 1, regions)
    alone = RegionSet([boxes[0][:3]], [torch.zeros(3).long()])
    module.queue.vectors.zero_()
    expected, expected_numbers = module(QUERIES + 1, TARGETS + 1, alone)
    assert filled.item() == pytest.approx(expected.item(), rel=1e-6)
    assert numbers()["hit_rate"] == expected_numbers()["hit_rate"]


def test_overlaps_stay_within_an_image():
    found = overlapping([BOXES, BOXES[:2]], 0.5)
    expected = torch.eye(5, dtype=torch.bool)
    for i, j in ((0, 1), (3, 4)):
        expected[i, j] = expected[j, i] = True
    assert torch.equal(found, expected)
    assert not overlapping([BOXES], 1.0).any()
    assert torch.equal(overlapping([BOXES], 0.85), torch.eye(3, dtype=torch.bool))
    half = Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]]))
    assert torch.equal(overlapping([half], 0.5), torch.eye(2, dtype=torch.bool))
    assert overlapping([BOXES[:0], BOXES[:0]], 0.5).shape == (0, 0)


def test_localization_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    differences = torch.tensor(
        [[[0.1, 0.1, -0.1, -0.1], [0.3, 0, 0.1, 0.2]], [[0.5, 0.5, 0.5, 0.5], [-1, 0, 0.5, 0]]]
    )
    student = torch.randn(2, 2, 4, requires_grad=True)
    loss = class_aware_localization(probs, student.detach() + differences, student)
    assert loss.item() == pytest.approx(0.265, abs=1e-6)
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert class_aware_localization(probs[:0], student[:0], student[:0]) == 0


@pytest.mark.parametrize("student_boxes", [1, 3])
@pytest.mark.parametrize("teacher_boxes", [1, 3])
def test_localization_of_class_agnostic_boxes(teacher_boxes, student_boxes):
    """A box without class stands for each: between two of them, (1 − p_bg) |t − s| is left."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(5, 4, generator=generator).softmax(dim=1)
    t = torch.randn(5, teacher_boxes, 4, generator=generator)
    s = torch.randn(5, student_boxes, 4, generator=generator)
    naive = 0
    for i in range(5):
        for k in range(4):
            pairs = ((t[i, c % teacher_boxes, k], s[i, c % student_boxes, k]) for c in range(3))
            naive += abs(sum(probs[i, c] * (a - b) for c, (a, b) in enumerate(pairs))) / 5
    assert torch.allclose(class_aware_localization(probs, t, s), naive)
    if teacher_boxes == student_boxes == 1:
        expected = ((1 - probs[:, -1:]) * (t - s)[:, 0].abs()).sum() / 5
        assert torch.allclose(naive, expected)


def test_classes_by_hand():
    """KL([3/4, 1/4] | [1/2, 1/2]) = log 2 + 3/4 log 3/4 + 1/4 log 1/4, and 0 where both agree."""
    teacher = torch.tensor([[3.0, 1.0], [2.0, 5.0]]).log().requires_grad_()
    student = torch.tensor([[1.0, 1.0], [2.0, 5.0]]).log().requires_grad_()
    loss = classification_kl(student, teacher)
    assert loss.item() == pytest.approx(0.130812 / 2, abs=1e-6)
    loss.backward()  # (p_s - p_t) / R
    expected = torch.tensor([[-0.125, 0.125], [0.0, 0.0]])
    assert torch.allclose(student.grad, expected, atol=1e-6) and teacher.grad is None
    assert classification_kl(student[:0], teacher[:0]) == 0


def in_order(queue):
    """What a queue of one number per vector holds, oldest first."""
    return queue.vectors.roll(-int(queue.next), dims=0).flatten().tolist()


def test_queue_is_first_in_first_out():
    queue = VectorQueue(4, 1)
    queue.append(torch.tensor([[1.0], [2.0], [3.0]]))
    assert in_order(queue) == [0, 1, 2, 3]
    queue.append(torch.tensor([[4.0], [5.0]]))
    assert in_order(queue) == [2, 3, 4, 5]
    queue.append(torch.zeros(0, 1))
    assert in_order(queue) == [2, 3, 4, 5]
    queue.append(torch.arange(10.0)[:, None])
    assert in_order(queue) == [6, 7, 8, 9]
    assert queue.vectors.untyped_storage().nbytes() == 16


def test_a_restored_queue_goes_on_where_it_was():
    queue, restored = VectorQueue(4, 1), VectorQueue(4, 1)
    queue.append(torch.arange(1.0, 7)[:, None])
    queue.append(torch.tensor([[7.0]]))
    restored.load_state_dict(queue.state_dict())
    for one in (queue, restored):
        one.append(torch.tensor([[8.0], [9.0]]))
        assert in_order(one) == [6, 7, 8, 9]


def test_the_queue_of_an_older_run_begins_with_its_oldest_vector():
    queue = VectorQueue(4, 1)
    queue.append(torch.ones(1, 1))
    queue.load_state_dict({"vectors": torch.tensor([[2.0], [3.0], [4.0], [5.0]])})
    queue.append(torch.tensor([[6.0]]))
    assert in_order(queue) == [3, 4, 5, 6]


def test_the_host_need_not_know_where_the_queue_is():
    queue = VectorQueue(4, 1)
    with HostSyncs(nn.Identity()) as syncs:
        queue.append(torch.ones(3, 1))
        queue.append(torch.ones(3, 1))
    assert not syncs.found


def test_queue_stays_float32_without_gradient():
    queue = VectorQueue(4, 1)
    queue.append(torch.ones(2, 1, dtype=torch.bfloat16, requires_grad=True))
    assert queue.vectors.dtype == torch.float32 and not queue.vectors.requires_grad


def test_without_queue():
    queue = VectorQueue(0, 3)
    queue.append(torch.ones(5, 3))
    assert queue.vectors.shape == (0, 3)


def test_one_process_gathers_its_own():
    vectors = torch.randn(3, 2)
    everything, first = gather_over_gpus(vectors)
    assert first == 0 and torch.equal(everything, vectors)

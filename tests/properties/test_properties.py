"""Masks, samplers, losses and schedules over sizes, counts, dtypes and degenerate boxes."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from d2kd.data.stream import StreamFrom, delivery_order, replay
from d2kd.layers.boxes import iou_log_loss, paired_iou
from d2kd.layers.focal import quality_focal_loss
from d2kd.layers.masks import object_masks, valid_cells
from d2kd.methods.core.schedule import DECAYS, TermSchedule
from d2kd.methods.crosskd import align_statistics, localization_kd, quality_focal_kd
from d2kd.methods.defeat import decoupled_classification, decoupled_imitation
from d2kd.methods.frs import feature_richness, richness_classification, richness_imitation

settings.register_profile("d2kd", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("d2kd")

counts = st.integers(1, 4)
sides = st.integers(1, 9)
seeds = st.integers(0, 2**31 - 1)
scales = st.sampled_from([0.0, 1e-6, 1.0, 50.0])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
coordinates = st.one_of(st.integers(-40, 300), st.floats(-40, 300, width=32))
boxes = st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), max_size=5)
LEVELS = ([(13, 17), (7, 9), (4, 5)], [16, 32, 64])


def numbers(seed, *shape, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def corners(rows):
    """Boxes with their corners in order, sides of 0 among them."""
    tensor = torch.tensor(rows, dtype=torch.float32).reshape(-1, 2, 2)
    return torch.cat([tensor.amin(1), tensor.amax(1)], dim=1)


def good(*values, negative=False):
    for value in values:
        assert value.isfinite().all()
        assert negative or (value >= -1e-6).all()  # of float32


def naive_mask(image_boxes, size, stride):
    mask = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in (image_boxes / stride).trunc().tolist():
        left, top = max(left, 0), max(top, 0)
        right, bottom = min(right, size[1]), min(bottom, size[0])
        if left == right or top == bottom:
            left, top = min(left, size[1] - 1), min(top, size[0] - 1)
            right, bottom = left + 1, top + 1
        mask[int(top) : max(int(bottom), 0), int(left) : max(int(right), 0)] = True
    return mask


@given(st.lists(boxes, min_size=1, max_size=3))
def test_masks_are_those_of_a_loop_over_boxes(images):
    images = [corners(rows) for rows in images]
    masks = object_masks(images, *LEVELS, assign="all_levels")
    for mask, size, stride in zip(masks, *LEVELS):
        assert torch.equal(mask, torch.stack([naive_mask(b, size, stride) for b in images]))
    official = object_masks(images, *LEVELS)
    assert all(not (one & ~every).any() for one, every in zip(official, masks))


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3), sides)
def test_every_image_has_a_valid_cell(image_sizes, stride):
    mask = valid_cells(image_sizes, (9, 9), stride, "cpu")
    assert mask.flatten(1).any(1).all() and mask[:, 0, 0].all()


@settings(max_examples=30)
@given(
    st.integers(0, 3),
    counts,
    st.booleans(),
    st.integers(0, 9),
    st.lists(st.booleans(), min_size=1, max_size=12),
)
def test_a_stream_goes_on_where_it_was(workers, batch_size, grouping, done, wide):
    def sampler():
        return (i * 7 % len(wide) for i in itertools.count())

    class Sampler:
        def __iter__(self):
            return sampler()

    done = done if len(set(wide)) == 1 or not grouping else 0
    order = delivery_order(workers, batch_size, grouping)
    assert sorted(order) == list(range(len(order)))
    state = replay(Sampler(), order, batch_size, done, wide if grouping else None)
    delivered, waiting = state
    if grouping and done:
        assert delivered >= done * batch_size and len(waiting) == delivered - done * batch_size
    resumed = StreamFrom(Sampler(), order, delivered, waiting)
    period = len(order)
    undone = list(itertools.islice(iter(resumed), 2 * period))
    again = [undone[b + i] for b in (0, period) for i in order]
    expected = list(itertools.islice(enumerate(sampler()), delivered + 3 * period))
    blocks = range(0, len(expected) - period + 1, period)
    stream = [expected[b + i] for b in blocks for i in order]
    count = 2 * period - len(waiting)
    assert again == [*waiting, *stream[delivered : delivered + count]][: 2 * period]


@given(seeds, counts, counts, sides, sides, scales, dtypes)
def test_losses_of_maps(seed, n, channels, h, w, scale, dtype):
    shape = (n, channels, h, w)
    ours, theirs = (numbers(seed + i, *shape, scale=scale, dtype=dtype) for i in range(2))
    score = feature_richness(theirs)
    assert score.shape == (n, h, w)
    good(score, richness_imitation(ours, theirs, score))
    good(richness_classification(ours, theirs, score), negative=True)
    good(*decoupled_imitation(ours, theirs, score > score.float().mean()))
    good(*decoupled_imitation(ours, theirs, torch.zeros(n, h, w, dtype=torch.bool)))
    good(align_statistics(ours.float(), theirs.float()), negative=True)
    good(richness_imitation(ours, ours, score))
    assert richness_imitation(ours, ours, score) == 0


@given(seeds, st.integers(0, 6), counts, scales)
def test_losses_of_rows(seed, rows, classes, scale):
    ours, theirs = (numbers(seed + i, rows, classes + 1, scale=scale) for i in range(2))
    labels = torch.randint(classes + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    good(*decoupled_classification(ours, theirs, labels, classes, 1.0, 1.0))
    kd = quality_focal_kd(ours, theirs)
    good(kd, localization_kd(ours, theirs))
    assert kd.shape == ours.shape
    assert torch.allclose(quality_focal_kd(ours, ours), torch.zeros_like(ours))
    quality = theirs.sigmoid()
    expected = F.binary_cross_entropy_with_logits(ours, quality, reduction="none")
    expected = expected * (ours.sigmoid() - quality).abs() ** 2
    found = quality_focal_loss(ours, quality)
    assert torch.allclose(found.sum(), expected.sum(), rtol=1e-4, atol=1e-6)


@given(boxes, seeds)
def test_boxes_without_area(rows, seed):
    one = corners(rows)
    other = one[torch.randperm(len(one), generator=torch.Generator().manual_seed(seed))]
    iou, generalized = paired_iou(one, other)
    good(iou, iou_log_loss(iou))
    assert (iou <= 1 + 1e-6).all() and (generalized <= iou + 1e-6).all()
    assert (generalized >= -1 - 1e-6).all()


@given(
    st.sampled_from(sorted(DECAYS)),
    st.floats(0, 1e6),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(1, 50),
)
def test_schedules_are_finite_and_within_their_bounds(decay, weight, warmup, start, stop, length):
    schedule = TermSchedule(
        weight,
        max_iter=length,
        warmup_iters=warmup,
        decay=decay,
        start_iter=start,
        stop_iter=stop,
    )
    for iteration in range(60):
        value = schedule(iteration)
        assert 0 <= value <= 2 * weight
        if not schedule.active(iteration):
            assert value == 0

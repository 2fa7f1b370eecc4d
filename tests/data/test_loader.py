import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data import build as d2_build
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from small_shapes import SMALL

from d2kd.config import default_config
from d2kd.data.builtin import register_shapes
from d2kd.data.loader import ResumableLoader
from d2kd.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    register_shapes(SMALL, str(tmp_path_factory.mktemp("loader")))
    yield
    for split in ("train", "val"):
        DatasetCatalog.remove(f"small_{split}")
        MetadataCatalog.remove(f"small_{split}")


def config(workers=0, grouping=True, sampler="TrainingSampler", seed=7, batch=4):
    cfg = default_config()
    cfg.DATASETS.TRAIN = ("small_train",)
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    cfg.SOLVER.IMS_PER_BATCH = batch
    cfg.INPUT.MIN_SIZE_TRAIN = (40, 48, 56)
    cfg.INPUT.MAX_SIZE_TRAIN = 80
    cfg.SEED = seed
    return cfg


def batches(loader, number, start=0):
    loader.start_iter = start
    return list(itertools.islice(iter(loader), number))


def build(cfg, **options):
    """A loader as a new process would build it."""
    seed_all_rng(max(cfg.SEED, 0))
    return ResumableLoader(cfg, **options)


def names(batch):
    return [d["file_name"] for d in batch]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(itertools.chain(*left), itertools.chain(*right)):
        assert a["file_name"] == b["file_name"]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)


class Light:
    """A mapper that reads no file."""

    def __call__(self, d):
        return {k: d[k] for k in ("file_name", "width", "height")}


SAMPLERS = ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"]


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_same_batches_and_augmentations(workers, grouping):
    whole = batches(build(config(workers, grouping)), 13)
    for start in (1, 6, 11):
        resumed = batches(build(config(workers, grouping)), 13 - start, start)
        assert_same(whole[start:], resumed)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_order_is_that_of_plain_detectron2_from_any_start(workers, grouping, sampler):
    cfg = config(workers, grouping, sampler)
    seed_all_rng(cfg.SEED)
    plain = build_detection_train_loader(cfg, mapper=Light())
    expected = [names(b) for b in itertools.islice(plain, 40)]
    for start in (0, 17):
        found = batches(build(cfg, mapper=Light()), 40 - start, start)
        assert [names(b) for b in found] == expected[start:]


def test_a_run_resumes_on_sizes_of_numpy_and_with_a_decimal_point():
    dicts = DatasetCatalog.get("small_train")
    expected = batches(build(config(), mapper=Light(), dataset=dicts), 12)
    for kind in (np.int64, float):
        sides = [{side: kind(d[side]) for side in ("width", "height")} for d in dicts]
        dataset = [{**d, **s} for d, s in zip(dicts, sides)]
        resumed = batches(build(config(), mapper=Light(), dataset=dataset), 5, start=7)
        assert [names(b) for b in resumed] == [names(b) for b in expected[7:]]


def test_groups_hold_one_orientation():
    seen = set()
    for batch in batches(build(config()), 12):
        wide = {d["width"] > d["height"] for d in batch}
        assert len(wide) == 1
        seen |= wide
    assert seen == {True, False}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_rank_resumes_its_own_stream(rank, workers, monkeypatch):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(d2_build, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 3)
    cfg = config(workers, batch=6)
    whole = batches(build(cfg), 9)
    assert all(len(b) == 3 for b in whole)
    assert_same(whole[5:], batches(build(cfg), 4, 5))
    # Both ranks share each shuffle of the 24 images: neither sees an image of the other's.
    light = batches(build(config(0, False, batch=6), mapper=Light()), 4)
    monkeypatch.setattr(comm, "get_rank", lambda: 1 - rank)
    other = batches(build(config(0, False, batch=6), mapper=Light()), 4)
    mine, others = ({n for b in side for n in names(b)} for side in (light, other))
    assert len(mine) == len(others) == 12 and not mine & others


def test_augmentations_differ_between_epochs_and_seeds():
    def first_epochs(seed):
        loader = build(config(grouping=False, seed=seed))
        found = {}
        for d in itertools.chain(*batches(loader, 18)):
            found.setdefault(d["file_name"], []).append(d["image"])
        return found

    images = first_epochs(7)
    same = [all(i.shape == v[0].shape and torch.equal(i, v[0]) for i in v) for v in images.values()]
    assert not all(same)
    other = first_epochs(8)
    assert any(
        a[0].shape != b[0].shape or not torch.equal(a[0], b[0])
        for a, b in ((images[name], other[name]) for name in images)
    )


def test_workers_do_not_change_what_is_done_to_an_image():
    """Without grouping, the samples at the same place of the stream are equal pixel by pixel."""
    none, one = (batches(build(config(workers, grouping=False)), 5) for workers in (0, 1))
    assert_same(none, one)


def test_mapping_in_the_main_process_leaves_its_random_states_alone():
    loader = iter(build(config()))
    next(loader)  # the start of a torch DataLoader draws one number, as in Detectron2

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    next(loader)
    assert states() == before


def test_only_a_fresh_start_draws_from_torch_as_detectron2_does():
    def drawn(loader):
        torch.manual_seed(0)
        next(iter(loader))
        return torch.rand(1)

    cfg = config(workers=1)
    loader = build(cfg, mapper=Light())
    plain = build_detection_train_loader(cfg, mapper=Light())
    assert torch.equal(drawn(loader), drawn(plain))
    loader.start_iter = 2
    torch.manual_seed(0)
    untouched = torch.rand(1)
    assert torch.equal(drawn(loader), untouched)


def test_the_start_may_be_set_after_iter_was_called():
    whole = batches(build(config(), mapper=Light()), 6)
    loader = build(config(), mapper=Light())
    iterator = iter(loader)
    loader.start_iter = 4
    assert [names(next(iterator)) for _ in range(2)] == [names(b) for b in whole[4:]]


def test_without_a_seed_augmentations_stay_random_and_the_loader_still_starts_anywhere():
    loader = build(config(seed=-1))
    first, again = batches(loader, 8), batches(loader, 8)
    assert [names(b) for b in first] == [names(b) for b in again]
    pairs = zip(itertools.chain(*first), itertools.chain(*again))
    assert not all(
        a["image"].shape == b["image"].shape and torch.equal(a["image"], b["image"])
        for a, b in pairs
    )
    assert [names(b) for b in batches(loader, 3, 5)] == [names(b) for b in first[5:]]


def test_an_image_that_the_mapper_gives_up_is_replaced_the_same_way_each_time():
    class Picky(Light):
        def __call__(self, d):
            return None if d["image_id"] % 3 == 0 else super().__call__(d)

    whole = batches(build(config(grouping=False), mapper=Picky()), 9)
    resumed = batches(build(config(grouping=False), mapper=Picky()), 5, 4)
    assert [names(b) for b in whole[4:]] == [names(b) for b in resumed]
    assert all(len(b) == 4 for b in whole)


def test_a_batch_that_processes_cannot_share_is_a_user_error(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH is 4.*multiple.*3"):
        ResumableLoader(
            dataset=[{"width": 1, "height": 1}],
            sampler=itertools.repeat(0),
            mapper=Light(),
            total_batch_size=4,
            aspect_ratio_grouping=True,
            num_workers=0,
            seed=0,
        )


def test_starting_late_reads_no_skipped_image():
    class Counting(Light):
        mapped = 0

        def __call__(self, d):
            Counting.mapped += 1
            return super().__call__(d)

    batches(build(config(), mapper=Counting()), 1, 20000)
    assert Counting.mapped <= 3 * 4  # two half-full groups and the images of one batch

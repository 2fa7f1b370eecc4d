"""A training loader that Detectron2 builds and that can be resumed exactly.

Detectron2's own sampler, mapper, batching and aspect-ratio grouping stay in charge. Around them:

* the mapper runs under random states seeded from (SEED, rank, position in the sampler's stream), so
  that augmentations do not depend on what was drawn before, nor on the number of workers;
* to start at a later iteration, the stream of indices is replayed without reading an image.
"""

import contextlib
import random
from typing import Iterator, List, Tuple

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import Dataset

from d2kd.data.check import load_training_dicts
from d2kd.data.stream import Sample, StreamFrom, delivery_order, replay
from d2kd.errors import UserError


class ResumableLoader:
    """An endless iterable of batches, each a list of mapped dicts, as from Detectron2's loader.

    Iterating begins at batch ``start_iter``, which may be set until the first batch is asked for:
    workers are started no sooner. The batches are those that an uninterrupted run sees from there,
    if SEED >= 0 and the config is the same, NUM_WORKERS included, which shapes the batches too.

    A fresh run has the image order of plain Detectron2. It follows from the sampler's seed, which
    Detectron2 chooses once, when this object is built. With SEED < 0 order and augmentations differ
    from run to run, and a resumed run merely skips as many batches.

    A mapper may return None to give an image up, another is drawn for it. With aspect-ratio
    grouping, resuming is then exact only if all images have one orientation.
    """

    @configurable
    def __init__(
        self,
        *,
        dataset,
        sampler,
        mapper,
        total_batch_size,
        aspect_ratio_grouping,
        num_workers,
        seed,
    ):
        """
        Args:
            dataset: list of dicts in Detectron2's format, with "width" and "height".
            sampler: endless sampler of this rank's indices, the same at each iteration over it.
            mapper: maps a dict of the data set to the model's input.
            total_batch_size: images per iteration over all ranks.
            aspect_ratio_grouping: whether a batch holds only wide or only other images.
            num_workers: processes that load data; 0 loads in this one.
            seed: of the augmentations; negative leaves all random states alone.

        Raises:
            UserError: the batch cannot be shared equally by the ranks.
        """
        world_size = comm.get_world_size()
        if total_batch_size <= 0 or total_batch_size % world_size:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH is {total_batch_size}, expected a positive multiple of the "
                f"number of processes, {world_size}"
            )
        self.start_iter = 0
        self.batch_size = total_batch_size // world_size
        self.sampler = sampler
        self.dataset = _SeededDataset(dataset, mapper, seed)
        self._wide = [d["width"] > d["height"] for d in dataset] if aspect_ratio_grouping else None
        self._order = delivery_order(num_workers, self.batch_size, aspect_ratio_grouping)
        self._options = {
            "total_batch_size": total_batch_size,
            "aspect_ratio_grouping": aspect_ratio_grouping,
            "num_workers": num_workers,
        }

    @classmethod
    def from_config(cls, cfg, mapper=None, *, dataset=None):
        """Load DATASETS.TRAIN, unless dicts are given; Detectron2 chooses sampler and mapper."""
        dataset = load_training_dicts(cfg) if dataset is None else dataset
        parts = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset)
        return {**parts, "seed": cfg.SEED}

    def __iter__(self) -> Iterator[List[dict]]:
        delivered, waiting = replay(
            self.sampler, self._order, self.batch_size, self.start_iter, self._wide
        )
        sampler = StreamFrom(self.sampler, self._order, delivered, waiting)
        batches = iter(
            build_detection_train_loader(
                self.dataset, mapper=None, sampler=sampler, **self._options
            )
        )
        # Starting a torch DataLoader draws a number. A resumed run restores random states that
        # have been through this already, so only a fresh start may keep the change.
        with torch.random.fork_rng(devices=[], enabled=self.start_iter > 0):
            first = next(batches)
        yield first
        yield from batches


class _SeededDataset(Dataset):
    """Maps samples, each under random states that are a function of (seed, rank, position)."""

    def __init__(self, dicts: List[dict], mapper, seed: int):
        self.dicts = DatasetFromList(dicts, copy=False)  # serialised: workers share the memory
        self.mapper = PicklableWrapper(mapper)
        self.seed, self.rank = seed, comm.get_rank()

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, sample: Sample):
        position, index = sample
        if self.seed < 0:
            return self._map(index)
        with _random_states((self.seed, self.rank, position)):
            return self._map(index)

    def _map(self, index: int):
        mapped = self.mapper(self.dicts[index])
        while mapped is None:
            mapped = self.mapper(self.dicts[random.randrange(len(self))])
        return mapped


@contextlib.contextmanager
def _random_states(entropy: Tuple[int, ...]):
    """Seed Python's, NumPy's and torch's CPU generators; give their states back at the end."""
    seeds = [int(s) for s in np.random.SeedSequence(entropy).generate_state(3)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(seeds[2])
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

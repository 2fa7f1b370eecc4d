"""A training loader that Detectron2 builds and that can be resumed exactly.

Detectron2's own sampler, mapper, batching and aspect-ratio grouping stay in charge. Around them:

* the mapper runs under random states seeded from (SEED, rank, position in the sampler's stream), so
  that augmentations do not depend on what was drawn before, nor on the number of workers;
* to start at a later iteration, the stream of indices is replayed without reading an image.
"""

import contextlib
import logging
import random
from typing import Callable, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import Dataset, Sampler

from d2kd.errors import UserError
from d2kd.layers.random import preserve_rng_state

from .bad_images import BAD_IMAGES, BadImage, makes_white, mapped
from .check import load_training_dicts
from .stream import Sample, StreamFrom, delivery_order, replay
from .workers import leave_signals_to_parent

logger = logging.getLogger(__name__)


def images_per_process(total_batch_size: int, count: int) -> int:
    """
    Args:
        total_batch_size: images per iteration.
        count: processes of the run.

    Raises:
        UserError: if the processes cannot share the batch equally.
    """
    if total_batch_size <= 0 or total_batch_size % count:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {total_batch_size}, expected a positive multiple of the "
            f"number of processes, {count}"
        )
    return total_batch_size // count


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
        dataset: List[dict],
        sampler: Sampler,
        mapper: Callable[[dict], Optional[dict]],
        total_batch_size: int,
        aspect_ratio_grouping: bool,
        num_workers: int,
        seed: int,
        skip_bad_images: int = 0,
    ):
        """
        Args:
            dataset: in Detectron2's format, with "width" and "height".
            sampler: endless sampler of this rank's indices, the same at each iteration over it.
            mapper: maps a dict of the data set to the model's input.
            total_batch_size: images per iteration over all ranks.
            aspect_ratio_grouping: whether a batch holds only wide or only other images.
            num_workers: processes that load data; 0 loads in this one.
            seed: of the augmentations; negative leaves all random states alone.
            skip_bad_images: how many files that are no image this process may skip, each counted
                once; the next one of their orientation is taken in their place.

        Raises:
            UserError: the batch cannot be shared equally by the ranks.
        """
        self.start_iter = 0
        self.batch_size = images_per_process(total_batch_size, comm.get_world_size())
        self.sampler = sampler
        self.dataset = _SeededDataset(dataset, mapper, seed, skip_bad_images > 0)
        self._skip_bad_images = skip_bad_images
        self._bad_images: Dict[str, str] = {}
        grouped = dataset if aspect_ratio_grouping else []
        # Sizes may be NumPy's, whose comparison gives no bool: replaying indexes by these
        wide = [bool(d["width"] > d["height"]) for d in grouped]
        self._wide = wide if aspect_ratio_grouping else None
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
        return {**parts, "seed": cfg.SEED, "skip_bad_images": cfg.RUN.SKIP_BAD_IMAGES}

    def __iter__(self) -> Iterator[List[dict]]:
        delivered, waiting = replay(
            self.sampler, self._order, self.batch_size, self.start_iter, self._wide
        )
        sampler = StreamFrom(self.sampler, self._order, delivered, waiting)
        loader = build_detection_train_loader(
            self.dataset, mapper=None, sampler=sampler, **self._options
        )
        # Starting a torch DataLoader draws a number. A resumed run restores random states that
        # have been through this already, so only a fresh start may keep the change.
        with torch.random.fork_rng(devices=[], enabled=self.start_iter > 0):
            batches = iter(loader)
            first = next(batches)
        yield self._checked(first)
        yield from map(self._checked, batches)

    def _checked(self, batch: List[dict]) -> List[dict]:
        """
        Raises:
            UserError: if it needed more files that are no image than this process may skip.
        """
        for sample in batch:
            for path, problem in sample.pop(BAD_IMAGES, ()):
                if path not in self._bad_images:
                    self._bad_images[path] = problem
                    self._count_bad_image(path, problem)
        return batch

    def _count_bad_image(self, path: str, problem: str) -> None:
        count, limit = len(self._bad_images), self._skip_bad_images
        if count > limit:
            skipped = f", after {limit} others" if limit else ""
            raise UserError(
                f"image {path} cannot be read ({problem}){skipped}: repair it, or set "
                f"RUN.SKIP_BAD_IMAGES to how many files a process may skip (it is {limit})"
            )
        logger.warning(f"Skipped image {path} ({problem}): {count} of at most {limit}")


class _SeededDataset(Dataset):
    """Maps samples, each under random states that are a function of (seed, rank, position)."""

    def __init__(self, dicts: List[dict], mapper: Callable, seed: int, skip: bool):
        self.dicts = DatasetFromList(dicts, copy=False)  # serialised: workers share the memory
        self.mapper, self.refuse_deep = PicklableWrapper(mapper), makes_white(mapper)
        self.seed, self.rank, self.skip = seed, comm.get_rank(), skip
        self._known: Set[int] = set()  # images that have been read once

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, sample: Sample):
        leave_signals_to_parent()
        position, index = sample
        if self.seed < 0:
            return self._map(index)
        with _random_states((self.seed, self.rank, position)):
            return self._map(index)

    def _map(self, index: int):
        bad: List[Tuple[str, str]] = []
        sample = None
        while sample is None:
            entry = self.dicts[index]
            try:
                sample = mapped(entry, self.mapper, self.refuse_deep and index not in self._known)
                self._known.add(index)
                index = random.randrange(len(self)) if sample is None else index
            except BadImage as problem:
                bad.append((entry["file_name"], str(problem)))
                if not self.skip or len(bad) == len(self):
                    sample = {k: entry[k] for k in ("file_name", "width", "height")}
                index = self._next_alike(index, entry)
        return {**sample, BAD_IMAGES: bad} if bad else sample

    def _next_alike(self, index: int, entry: dict) -> int:
        """The next image of the same orientation: a batch holds only one when they are grouped."""
        wide = entry["width"] > entry["height"]
        following = ((index + i) % len(self) for i in range(1, len(self) + 1))
        dicts = ((i, self.dicts[i]) for i in following)
        return next(i for i, d in dicts if (d["width"] > d["height"]) == wide)


@contextlib.contextmanager
def _random_states(entropy: Tuple[int, ...]) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's CPU generators for a while."""
    seeds = [int(s) for s in np.random.SeedSequence(entropy).generate_state(3)]
    with preserve_rng_state(cuda=False):
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(seeds[2])
        yield

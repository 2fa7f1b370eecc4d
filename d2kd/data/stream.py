"""The order in which Detectron2's training loader delivers samples, and how to start inside it.

Detectron2's loader runs the sampler in every worker; each worker keeps its share of the indices,
and the shares are interleaved again, which does not always give the sampler's order back. All here
works on indices: no image is read.

A sample is a pair (position, index): its place in the stream of this rank's sampler, and the image.
"""

import inspect
import itertools
from typing import Iterable, Iterator, List, Optional, Tuple

import numpy as np
from detectron2.data.common import ToIterableDataset
from torch.utils.data import Sampler

Sample = Tuple[int, int]


def delivery_order(num_workers: int, batch_size: int, grouping: bool) -> List[int]:
    """Order in which Detectron2's loader delivers the sampler's stream, over one period.

    Worker w of n keeps every n-th chunk of the stream, and the loader takes one fetch from each
    worker in turn. A chunk is one index in release 0.6 and a batch in later ones; a fetch is
    a batch, or one image when images are grouped afterwards.

    Args:
        batch_size: of one rank.
        grouping: by aspect ratio.

    Returns:
        the position of the i-th delivered sample, for i < n * batch_size; then it repeats, shifted.
    """
    sharding = inspect.signature(ToIterableDataset.__init__).parameters
    chunk = batch_size if "shard_chunk_size" in sharding else 1
    fetch = 1 if grouping else batch_size
    workers = max(num_workers, 1)

    def position(i: int) -> int:
        nth_fetch, within_fetch = divmod(i, fetch)
        nth_of_worker, worker = divmod(nth_fetch, workers)
        nth_chunk, within_chunk = divmod(nth_of_worker * fetch + within_fetch, chunk)
        return (nth_chunk * workers + worker) * chunk + within_chunk

    return [position(i) for i in range(workers * batch_size)]


def replay(
    sampler: Iterable[int],
    order: List[int],
    batch_size: int,
    num_batches: int,
    wide: Optional[List[bool]],
) -> Tuple[int, List[Sample]]:
    """State of the stream after some batches.

    Args:
        sampler: endless.
        order: from ``delivery_order``.
        batch_size: of one rank.
        wide: per index, whether the image is wider than high; None without grouping.

    Returns:
        how many samples have been delivered, and those of them that still wait for their batch.
    """
    if wide is None:
        return num_batches * batch_size, []
    buckets: Tuple[List[Sample], List[Sample]] = ([], [])
    for delivered, sample in enumerate(_permuted(enumerate(sampler), order)):
        if num_batches == 0:
            return delivered, buckets[0] + buckets[1]
        bucket = buckets[wide[sample[1]]]
        bucket.append(sample)
        if len(bucket) == batch_size:
            bucket.clear()
            num_batches -= 1
    raise AssertionError("a training sampler must be endless")


class StreamFrom(Sampler):
    """Yields samples so that Detectron2's loader delivers ``waiting`` and then the rest.

    Args:
        sampler: endless; each iteration over it gives the same indices.
        order: from ``delivery_order``.
        delivered: number of samples to leave out.
        waiting: of these, the ones to deliver again, first.
    """

    def __init__(self, sampler, order: List[int], delivered: int, waiting: List[Sample]):
        self.sampler, self.order, self.delivered, self.waiting = sampler, order, delivered, waiting

    def __iter__(self) -> Iterator[Sample]:
        periods, rest = divmod(self.delivered, len(self.order))
        stream = itertools.islice(enumerate(self.sampler), periods * len(self.order), None)
        stream = itertools.islice(_permuted(stream, self.order), rest, None)
        # The loader will apply the order once more.
        inverse = np.argsort(self.order).tolist()
        return _permuted(itertools.chain(self.waiting, stream), inverse)


def _permuted(stream: Iterator[Sample], order: List[int]) -> Iterator[Sample]:
    """Reorder each block of len(order) samples of an endless stream: the i-th is now order[i]."""
    while True:
        block = list(itertools.islice(stream, len(order)))
        assert len(block) == len(order), "a training sampler must be endless"
        yield from [block[i] for i in order]

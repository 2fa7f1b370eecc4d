"""Contrastive loss between the regions of two detectors, and the memory of its negatives.

Shapes: R queries (the student's regions on this GPU), M current keys (the teacher's regions of the
step), Q places in the memory, d numbers per vector.
"""

from typing import List, Tuple

import torch
import torch.distributed as dist
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils import comm
from torch import Tensor, nn

from d2kd.methods.channel_statistics import as_float

# Logit of what does not count as a negative: finite, so that gradients are 0 and never NaN
_EXCLUDED = -1e30
# Keys of the memory that are compared at once
_CHUNK = 8192


def _logits(queries: Tensor, keys: Tensor, gamma: float) -> Tensor:
    """(R, C) cosines / γ; empty places, vectors of zeros, are excluded."""
    empty = (keys == 0).all(dim=1)
    return (queries @ keys.t()).div_(gamma).masked_fill_(empty, _EXCLUDED)


class _QueueLogSumExp(torch.autograd.Function):
    """log Σ exp(q · k / γ) over a queue without gradient, chunk by chunk. The gradient is summed up
    along with it, so that no more than one chunk of logits ever exists."""

    @staticmethod
    def forward(ctx, queries: Tensor, queue: Tensor, gamma: float) -> Tensor:
        total = queries.new_full((len(queries),), _EXCLUDED)
        mean_key = torch.zeros_like(queries)
        for keys in queue.split(_CHUNK):
            logits = _logits(queries, keys, gamma)
            updated = torch.logaddexp(total, logits.logsumexp(dim=1))
            mean_key *= (total - updated).exp()[:, None]
            mean_key += (logits - updated[:, None]).exp() @ keys
            total = updated
        ctx.save_for_backward(mean_key / gamma)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.saved_tensors[0] * grad[:, None], None, None


def contrastive_loss(
    queries: Tensor,
    keys: Tensor,
    excluded: Tensor,
    queue: Tensor,
    gamma: float,
    positive_in_denominator: bool = True,
) -> Tensor:
    """Minus the logarithm of the share that a query's own key has among its key and the negatives.

    Args:
        queries: (R, d) unit vectors.
        keys: (M, d) unit vectors, M >= R: key i is the positive of query i, the others are its
            negatives.
        excluded: (R, M) bool, keys that are no negatives of a query. The diagonal is not read.
        queue: (Q, d) unit vectors, further negatives, without gradient; vectors of zeros are empty.
        gamma: temperature γ, > 0.
        positive_in_denominator: without it only the negatives are below the fraction line; a query
            without negatives then has the loss 0.

    Returns:
        (R,), float32. Finite for any R, M and Q.
    """
    queries, keys, queue = as_float(queries), as_float(keys), as_float(queue)
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ keys.t() / gamma
        positive = logits.diagonal()
        own = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
        negatives = logits.masked_fill(excluded | own, _EXCLUDED)
        negatives = torch.cat([negatives, logits.new_full((len(logits), 1), _EXCLUDED)], dim=1)
        past = _QueueLogSumExp.apply(queries, queue.detach(), gamma)
        denominator = torch.logaddexp(negatives.logsumexp(dim=1), past)
    if positive_in_denominator:
        return torch.logaddexp(positive, denominator) - positive
    return torch.where(denominator > _EXCLUDED / 2, denominator - positive, 0.0 * positive)


@torch.no_grad()
def hit_rate(queries: Tensor, keys: Tensor, excluded: Tensor, queue: Tensor) -> Tensor:
    """How many queries are nearer to their own key than to any negative, a scalar in [0, 1];
    arguments as in :func:`contrastive_loss`."""
    queries, keys, queue = as_float(queries), as_float(keys), as_float(queue)
    with torch.autocast(queries.device.type, enabled=False):
        cosines = queries @ keys.t()
        positive = cosines.diagonal()
        own = torch.eye(*cosines.shape, dtype=torch.bool, device=cosines.device)
        nearest = [cosines.new_full((len(queries), 1), _EXCLUDED)]
        nearest += [cosines.masked_fill(excluded | own, _EXCLUDED)]
        nearest += [_logits(queries, k, 1.0).amax(1, True) for k in queue.split(_CHUNK) if len(k)]
        hits = positive > torch.cat(nearest, dim=1).amax(dim=1)
    return hits.float().sum() / max(len(queries), 1)


def overlapping(boxes: List[Boxes], threshold: float) -> Tensor:
    """Which boxes are of the same image and overlap by more than a threshold.

    Args:
        boxes: per image.
        threshold: of the IoU; from 1 on, nothing overlaps.

    Returns:
        (R, R) bool over the boxes of all images, in order.
    """
    if threshold >= 1:
        size = sum(len(b) for b in boxes)
        return torch.zeros(size, size, dtype=torch.bool, device=boxes[0].device)
    return torch.block_diag(*[pairwise_iou(b, b) > threshold for b in boxes])


@torch.no_grad()
def gather_over_gpus(vectors: Tensor) -> Tuple[Tensor, Tensor]:
    """The vectors of all processes. Every process has to call it; it may have none.

    Args:
        vectors: (R, d); R may differ between processes.

    Returns:
        the vectors of the other processes (O, d), and those of all in the order of ranks.
    """
    if comm.get_world_size() == 1:
        return vectors[:0], vectors
    count = torch.tensor([len(vectors)], device=vectors.device)
    counts = [torch.empty_like(count) for _ in range(comm.get_world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()  # on the host, where the shapes of tensors are
    padded = vectors.new_zeros(max(sizes), vectors.shape[1])
    padded[: len(vectors)] = vectors
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    parts = [part[:size] for part, size in zip(parts, sizes)]
    others = [part for rank, part in enumerate(parts) if rank != comm.get_rank()]
    return torch.cat(others), torch.cat(parts)


class Memory(nn.Module):
    """The last vectors of all processes, first in, first out.

    Attributes:
        vectors: (Q, d) float32, oldest first; places that were never filled hold zeros. A buffer:
            saved with the run. The same in every process.
    """

    def __init__(self, size: int, dim: int):
        """
        Args:
            size: Q, whatever the number of GPUs; 0 = no memory.
            dim: d.
        """
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, dim))

    @torch.no_grad()
    def append(self, vectors: Tensor) -> None:
        """
        Args:
            vectors: (M, d), newest last. The oldest of the memory make room for them.
        """
        size = len(self.vectors)
        newest = vectors[max(len(vectors) - size, 0) :].to(self.vectors.dtype)
        # Not in place: a loss that waits for its backward pass may still hold the old ones.
        self.vectors = torch.cat([self.vectors[len(newest) :], newest])

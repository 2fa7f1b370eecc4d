"""Contrastive loss between the regions of two detectors.

Shapes: R queries (the student's regions on this GPU), M current keys (the teacher's regions of all
GPUs), Q places in the queue, d numbers per vector, A anchors per location.
"""

from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.layers import as_float, gather_over_gpus
from d2kd.methods.core import Diagnostics
from d2kd.views import RegionSet

from .queue import VectorQueue

# Logit of what does not count as a negative: finite, so that gradients are 0 and never NaN
_EXCLUDED = -1e30
# Keys of the queue that are compared at once: few enough for a processor's cache
_CHUNK = 2048


class _Queue(torch.autograd.Function):
    """log Σ exp(q · k / γ) over a queue without gradient, and the highest q · k / γ of each query.
    The gradient is summed up along with it, chunk by chunk: no more than one chunk of logits ever
    exists. 1 024 queries and 81 920 keys take 0.37 of the time of torch's own operations on a CPU,
    of which autograd keeps 320 MiB of logits."""

    @staticmethod
    def forward(ctx, queries: Tensor, queue: Tensor, gamma: float) -> Tuple[Tensor, Tensor]:
        scaled, mean_key = queries / gamma, torch.zeros_like(queries)
        highest = queries.new_full((len(queries), 1), _EXCLUDED)
        total = torch.zeros_like(highest)
        for keys in queue.split(_CHUNK) if len(queue) else ():
            logits = torch.addmm(_only_empty(keys), scaled, keys.t())
            higher = torch.maximum(highest, logits.amax(dim=1, keepdim=True))
            shares, rescale = logits.sub_(higher).exp_(), (highest - higher).exp_()
            total.mul_(rescale).add_(shares.sum(dim=1, keepdim=True))
            mean_key.mul_(rescale).addmm_(shares, keys)
            highest = higher
        total.clamp_(min=1)  # as every sum is, but that of an empty queue
        ctx.save_for_backward(mean_key / (total * gamma))
        summed, highest = (highest + total.log())[:, 0], highest[:, 0]
        ctx.mark_non_differentiable(highest)
        return summed, highest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _):
        return ctx.saved_tensors[0] * grad[:, None], None, None


def _only_empty(keys: Tensor) -> Tensor:
    """(C,), what excludes those of C keys that are vectors of zeros, when added to their logits."""
    return (keys == 0).all(dim=1).to(keys.dtype) * _EXCLUDED


class Similarity(NamedTuple):
    """How near R queries are to keys, as cosines over γ. Float32, finite."""

    positive: Tensor  # (R,) to their own key
    negatives: Tensor  # (R,) logarithm of the summed exponentials of all negatives
    highest: Tensor  # (R,) to the nearest negative, without gradient

    def loss(self, positive_in_denominator: bool) -> Tensor:
        """(R,), see :func:`contrastive_loss`."""
        if positive_in_denominator:
            return torch.logaddexp(self.positive, self.negatives) - self.positive
        any_negative = self.negatives > _EXCLUDED / 2
        return torch.where(any_negative, self.negatives - self.positive, 0.0 * self.positive)

    def hits(self) -> Tensor:
        """(R,) bool, whether a query is nearer to its own key than to any negative."""
        return self.positive.detach() > self.highest


def similarity(
    queries: Tensor, keys: Tensor, excluded: Tensor, queue: Tensor, gamma: float
) -> Similarity:
    """Compares queries with the keys of this step and those of the queue; arguments as in
    :func:`contrastive_loss`."""
    queries, keys, queue = as_float(queries), as_float(keys), as_float(queue)
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ keys.t() / gamma
        positive = logits.diagonal()
        own = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
        negatives = logits.masked_fill(excluded | own, _EXCLUDED) + _only_empty(keys.detach())
        negatives = F.pad(negatives, (0, 1), value=_EXCLUDED)
        past, highest = _Queue.apply(queries, queue.detach(), gamma)
        together = torch.logaddexp(negatives.logsumexp(dim=1), past)
    return Similarity(positive, together, torch.maximum(negatives.detach().amax(dim=1), highest))


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
            negatives. Vectors of zeros are no negatives.
        excluded: (R, M) bool, keys that are no negatives of a query. The diagonal is not read.
        queue: (Q, d) unit vectors, further negatives, without gradient; vectors of zeros are empty.
        gamma: temperature γ, > 0.
        positive_in_denominator: without it only the negatives are below the fraction line; a query
            without negatives then has the loss 0.

    Returns:
        (R,), float32. Finite for any R, M and Q.
    """
    return similarity(queries, keys, excluded, queue, gamma).loss(positive_in_denominator)


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


class RegionContrast(nn.Module):
    """Adapter, shared projection and queue around :func:`contrastive_loss`: the student's vector of
    a region is nearer to the teacher's of the same region than to those of others."""

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        proj_dim: int,
        num_anchors: int,
        gamma: float,
        positive_in_denominator: bool,
        negative_iou: float,
        queue_size: int,
    ):
        """
        Args:
            student_dim, teacher_dim: lengths of the regions' vectors.
            proj_dim: d, width of the projection; 0 = none, then there is always an adapter.
            num_anchors: A, as every anchor of a location has an adapter of its own.
            gamma: temperature γ.
            positive_in_denominator: see :func:`contrastive_loss`.
            negative_iou: boxes of an image with a higher IoU are no negatives of each other.
            queue_size: Q, over all GPUs.
        """
        super().__init__()
        self.num_anchors = num_anchors
        self.gamma = gamma
        self.positive_in_denominator = positive_in_denominator
        self.negative_iou = negative_iou
        adapts = student_dim != teacher_dim or num_anchors > 1 or not proj_dim
        # With one adapter per anchor, their outputs stand one after the other.
        self.adapter = (
            nn.Linear(student_dim, num_anchors * teacher_dim, bias=bool(proj_dim))
            if adapts
            else nn.Identity()
        )
        self.projection = (
            nn.Linear(teacher_dim, proj_dim, bias=False) if proj_dim else nn.Identity()
        )
        self.queue = VectorQueue(queue_size, proj_dim or teacher_dim)

    def forward(
        self, student: Tensor, teacher: Tensor, regions: RegionSet
    ) -> Tuple[Tensor, Diagnostics]:
        """Compares with the queue as it is, then adds the teacher's vectors of all GPUs to it.
        Every process has to call this, with or without regions.

        Args:
            student: (R, D_s) vectors of the regions.
            teacher: (R, D_t); gets no gradient.
            regions: their boxes, and the anchors that predicted them if A > 1.

        Returns:
            the mean over regions, a scalar, 0 without any; and what can be logged.
        """
        theirs = as_float(teacher.detach())
        if regions.valid is not None:
            theirs = theirs * regions.valid[:, None]  # a vector of zeros is no key
        with torch.autocast(student.device.type, enabled=False):
            queries = self.project(self.adapt(as_float(student), regions.anchors))
            everything, first = gather_over_gpus(theirs)
            keys = self.project(everything)
        ours_first = keys.roll(-first, dims=0)
        excluded = overlapping(regions.boxes, self.negative_iou)
        padded = F.pad(excluded, (0, len(keys) - len(queries)))
        found = similarity(queries, ours_first, padded, self.queue.vectors, self.gamma)
        self.queue.append(keys)

        def diagnostics() -> Dict[str, Tensor]:
            return {
                "hit_rate": regions.mean(found.hits().float()),
                "excluded": excluded.sum() - excluded.diagonal().sum(),
            }

        return regions.mean(found.loss(self.positive_in_denominator)), diagnostics

    def adapt(self, vectors: Tensor, anchors: Optional[List[Tensor]]) -> Tensor:
        """(R, D_s) -> (R, D_t)."""
        adapted = self.adapter(vectors)
        if self.num_anchors == 1:
            return adapted
        of_location = torch.cat(anchors) % self.num_anchors
        adapted = adapted.unflatten(1, (self.num_anchors, -1))
        return adapted[torch.arange(len(vectors), device=vectors.device), of_location]

    def project(self, vectors: Tensor) -> Tensor:
        """(R, D_t) -> (R, d) unit vectors."""
        return F.normalize(self.projection(vectors), dim=1)

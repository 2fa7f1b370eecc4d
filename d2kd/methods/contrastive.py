"""Contrastive loss between the regions of two detectors.

Shapes: R queries (the student's regions on this GPU), M current keys (the teacher's regions of all
GPUs), Q places in the memory, d numbers per vector, A anchors per location.
"""

from typing import Dict, List, Optional

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.methods.log import log_sometimes
from d2kd.methods.memory import Memory, gather_over_gpus
from d2kd.modeling.channel_statistics import as_float

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


class RegionContrast(nn.Module):
    """Adapter, shared projection and memory around :func:`contrastive_loss`: the student's vector
    of a region is nearer to the teacher's of the same region than to those of others."""

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        proj_dim: int = 128,
        num_anchors: int = 1,
        gamma: float = 0.07,
        positive_in_denominator: bool = True,
        negative_iou: float = 0.5,
        exclude_same_class: bool = False,
        queue_size: int = 81920,
        queue_raw: bool = False,
        stop_grad_teacher_proj: bool = False,
    ):
        """
        Args:
            student_dim, teacher_dim: lengths of the regions' vectors.
            proj_dim: d, width of the projection; 0 = none, then there is always an adapter.
            num_anchors: A, if every anchor of a location has an adapter of its own; else 1.
            gamma: temperature γ.
            positive_in_denominator: see :func:`contrastive_loss`.
            negative_iou: boxes of an image with a higher IoU are no negatives of each other.
            exclude_same_class: nor are boxes of an image whose objects are of one class.
            queue_size: Q, over all GPUs.
            queue_raw: keep the teacher's vectors and project them anew in every step.
            stop_grad_teacher_proj: the projection learns from the student's vectors alone.
        """
        super().__init__()
        self.num_anchors = num_anchors
        self.gamma = gamma
        self.positive_in_denominator = positive_in_denominator
        self.negative_iou = negative_iou
        self.exclude_same_class = exclude_same_class
        self.queue_raw = queue_raw
        self.stop_grad_teacher_proj = stop_grad_teacher_proj
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
        self.memory = Memory(queue_size, teacher_dim if queue_raw else proj_dim or teacher_dim)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: List[Boxes],
        classes: List[Tensor],
        anchors: Optional[Tensor] = None,
    ) -> Tensor:
        """Compares with the memory as it is, then adds the teacher's vectors of all GPUs to it.
        Every process has to call this, with or without regions.

        Args:
            student: (R, D_s) vectors of the regions.
            teacher: (R, D_t); gets no gradient.
            boxes: per image, R together.
            classes: per image, of the boxes; -1 = background.
            anchors: (R,) in 0 ... A - 1; only read if there are several adapters.

        Returns:
            the mean over regions, a scalar; 0 without any.
        """
        with torch.autocast(student.device.type, enabled=False):
            queries = self.project(self.adapt(as_float(student), anchors))
            everything, first = gather_over_gpus(as_float(teacher.detach()))
            keys = self.project(everything)
            queue = self.memory.vectors
            if self.queue_raw:
                with torch.no_grad():
                    queue = self.project(queue)
        self.memory.append(everything if self.queue_raw else keys)
        # This GPU's come first.
        keys = (keys.detach() if self.stop_grad_teacher_proj else keys).roll(-first, dims=0)
        excluded = self.excluded(boxes, classes)
        log_sometimes(lambda: self.numbers(queries, keys, excluded, queue))
        excluded = F.pad(excluded, (0, len(keys) - len(queries)))
        loss = contrastive_loss(
            queries, keys, excluded, queue, self.gamma, self.positive_in_denominator
        )
        return loss.sum() / max(len(loss), 1)

    def adapt(self, vectors: Tensor, anchors: Optional[Tensor]) -> Tensor:
        """(R, D_s) -> (R, D_t)."""
        adapted = self.adapter(vectors)
        if self.num_anchors == 1:
            return adapted
        adapted = adapted.unflatten(1, (self.num_anchors, -1))
        return adapted[torch.arange(len(vectors), device=vectors.device), anchors]

    def project(self, vectors: Tensor) -> Tensor:
        """(R, D_t) -> (R, d) unit vectors."""
        return F.normalize(self.projection(vectors), dim=1)

    def excluded(self, boxes: List[Boxes], classes: List[Tensor]) -> Tensor:
        """(R, R) bool: regions of this GPU that are no negatives of each other."""
        excluded = overlapping(boxes, self.negative_iou)
        if self.exclude_same_class:
            same = [(c[:, None] == c) & (c >= 0) for c in classes]
            excluded = excluded | torch.block_diag(*same)
        return excluded

    @torch.no_grad()
    def numbers(
        self, queries: Tensor, keys: Tensor, excluded: Tensor, queue: Tensor
    ) -> Dict[str, Tensor]:
        """What is logged: top-1 hit rate, and how many pairs of regions are excluded."""
        padded = F.pad(excluded, (0, len(keys) - len(queries)))
        return {
            "gdetkd_ckd/hit_rate": hit_rate(queries, keys, padded, queue),
            "gdetkd_ckd/excluded": excluded.sum() - excluded.diagonal().sum(),
        }

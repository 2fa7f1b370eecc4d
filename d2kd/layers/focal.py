"""Quality and distribution focal losses, and the labels that they take. GFL's own keep the type of
their arguments: give them float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import as_float, as_target

# Gradients of smaller size count as none: a CPU takes several times as long for a convolution of
# denormal numbers, which they turn into
_NO_GRADIENT = 1e-30


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(...) -> (..., K) float; labels outside 0 ... K - 1 (background, ignored) give zeros."""
    return (labels[..., None] == torch.arange(num_classes, device=labels.device)).float()


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss, GFL eq. 5: ``|q - sigmoid(x)|^beta * BCE(x, q)``.

    Args:
        logits: x, any shape.
        quality: q in [0, 1], same shape; 0 for all but the assigned class.
        beta: how fast good predictions lose weight.

    Returns:
        the loss of every element, same shape.
    """
    error = (quality - logits.sigmoid()).abs()
    return error.pow(beta) * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


class _QualityFocal(torch.autograd.Function):
    """Computes the gradient along with the loss. These maps are the largest of the whole step: at
    the peak there are three of them, with torch's own operations eight, which take 1.3 times as
    long (a map of (2, 720, 64, 64) on a CPU)."""

    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor, beta: float) -> Tensor:
        p, q = x.sigmoid(), z.sigmoid()
        bce = F.softplus(x, threshold=50).addcmul_(x, q, value=-1)
        error = q.neg_().add_(p)
        # loss = |e|^(β-1) |e BCE|, its gradient |e|^(β-1) sign(e) (β p (1-p) BCE + e²)
        gradient = p.addcmul_(p, p, value=-1).mul_(bce).mul_(beta).addcmul_(error, error)
        loss = bce.mul_(error).abs_()
        if beta != 1:
            factor = error.abs().pow_(beta - 1)
            gradient, loss = gradient.mul_(factor), loss.mul_(factor)
        ctx.save_for_backward(F.threshold_(gradient, _NO_GRADIENT, 0.0).mul_(error.sign_()))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.saved_tensors[0] * grad, None, None


def quality_focal_kd(logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """:func:`quality_focal_loss` towards the teacher's probabilities, in float32 or above:
    ``|σ(x) - q|^β · BCE(x, q)``, ``q = σ(z)``.

    Args:
        logits: x, (M, K) or any other shape.
        teacher_logits: z, same shape; gets no gradient.
        beta: how fast good predictions lose weight, >= 1.

    Returns:
        the loss of every element, same shape.
    """
    return _QualityFocal.apply(as_float(logits), as_target(teacher_logits, logits), beta)


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss, GFL eq. 6: cross-entropy with the two bins around a distance,
    each weighted by how near it is.

    Args:
        logits: (..., B) over the distances 0, 1, ..., B - 1.
        distances: (...) in [0, B - 1).

    Returns:
        (...).
    """
    log_p = logits.log_softmax(dim=-1)
    left = distances.floor()
    near_left = log_p.gather(-1, left.long()[..., None])[..., 0]
    near_right = log_p.gather(-1, left.long()[..., None] + 1)[..., 0]
    return -(left + 1 - distances) * near_left - (distances - left) * near_right

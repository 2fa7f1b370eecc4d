"""How far two distributions are apart."""

from torch import Tensor
from torch.nn import functional as F

from .precision import as_float, as_target


def kl_divergence(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """Kullback-Leibler divergence of softmax distributions, in float32 or above.

    Args:
        logits: of any shape.
        teacher_logits: same shape; gets no gradient.
        temperature: T, divides both.
        dim: along which the numbers of a distribution lie.

    Returns:
        T² · Σ q (log q - log p), the shape without ``dim``.
    """
    log_p = (as_float(logits) / temperature).log_softmax(dim)
    log_q = (as_target(teacher_logits, logits) / temperature).log_softmax(dim)
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    return kl.sum(dim) * temperature**2


def box_distribution_kl(
    deltas: Tensor, teacher_deltas: Tensor, num_anchors: int, temperature: float
) -> Tensor:
    """Divergence of the distributions of box sides that GFL's head predicts on a level.

    Args:
        deltas: (N, A·4·B, h, w), logits of B bins per side.
        teacher_deltas: same shape; gets no gradient.
        num_anchors: A.
        temperature: see :func:`kl_divergence`.

    Returns:
        (N, A, h, w), the mean over the four sides.
    """
    sides = (num_anchors, 4, -1)
    ours, theirs = deltas.unflatten(1, sides), teacher_deltas.unflatten(1, sides)
    return kl_divergence(ours, theirs, temperature, dim=3).mean(dim=2)

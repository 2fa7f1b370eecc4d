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

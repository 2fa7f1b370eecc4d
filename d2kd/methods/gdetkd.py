"""G-DetKD: Towards General Distillation Framework for Object Detectors via Contrastive and
Semantic-guided Feature Imitation (Yao et al., ICCV 2021, https://arxiv.org/abs/2108.07482)."""

from torch import Tensor

from d2kd.methods.channel_statistics import as_float
from d2kd.methods.contrastive import contrastive_loss
from d2kd.methods.semantic_guided import match_levels

__all__ = ["class_aware_localization", "contrastive_loss", "match_levels"]


def class_aware_localization(
    teacher_probs: Tensor, teacher_deltas: Tensor, student_deltas: Tensor
) -> Tensor:
    """L1 distance of the boxes' deltas, averaged over classes with the teacher's probabilities.

    Args:
        teacher_probs: (R, K + 1) softmax, background last; it is left out and gets no share.
        teacher_deltas, student_deltas: (R, K, 4), or (R, 1, 4) if class-agnostic.

    Returns:
        a scalar, Σ |Σ_c p_c (t_c − s_c)| / R, summed over the four deltas; 0 without regions.
    """
    weights = as_float(teacher_probs.detach())[:, :-1, None]
    difference = as_float(teacher_deltas.detach()) - as_float(student_deltas)
    return (weights * difference).sum(dim=1).abs().sum() / max(len(difference), 1)

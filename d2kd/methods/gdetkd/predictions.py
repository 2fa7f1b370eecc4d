"""The class and box terms of G-DetKD, between two-stage detectors.

Shapes: R regions, K classes.
"""

from torch import Tensor

from d2kd.layers import as_float, kl_divergence


def class_aware_localization(
    teacher_probs: Tensor, teacher_deltas: Tensor, student_deltas: Tensor
) -> Tensor:
    """L1 distance of the boxes' deltas, averaged over classes with the teacher's probabilities.

    Args:
        teacher_probs: (R, K + 1) softmax, background last; it is left out and gets no share.
        teacher_deltas, student_deltas: (R, K, 4), or (R, 1, 4) if class-agnostic, which then
            stands for every class; the two may differ in this.

    Returns:
        a scalar, Σ |Σ_c p_c (t_c − s_c)| / R, summed over the four deltas; 0 without regions.
    """
    weights = as_float(teacher_probs.detach())[:, :-1, None]
    difference = as_float(teacher_deltas.detach()) - as_float(student_deltas)
    distance = (weights * difference).sum(dim=1).abs()  # (R, 4)
    return distance.sum() / max(len(distance), 1)


def classification_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL divergence of the class distributions, Σ KL(softmax(z_t) ‖ softmax(z_s)) / R.

    Args:
        student_logits, teacher_logits: (R, K + 1).

    Returns:
        a scalar; 0 without regions.
    """
    kl = kl_divergence(student_logits, teacher_logits, dim=1)
    return kl.sum() / max(len(kl), 1)

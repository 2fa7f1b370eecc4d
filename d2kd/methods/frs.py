"""FRS: Distilling Object Detectors with Feature Richness (Du et al., NeurIPS 2021,
https://arxiv.org/abs/2111.00674).

The teacher's class scores say where features are rich. That score weights the imitation of FPN
levels, and of class predictions. Formulas follow the authors' released code, which the paper's
text agrees with as far as it could be checked.

Shapes: N images, C channels, A anchors per location, K classes, (h, w) the size of a level,
L levels.
"""

from typing import Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.errors import UserError
from d2kd.methods.adapters import conv_adapters
from d2kd.methods.distiller import DISTILLER_REGISTRY, Distiller, Needs
from d2kd.methods.schedule import term_config
from d2kd.modeling.families import paired_levels

# Far below any sum of scores that a detector gives; only keeps 0 / 0 away.
EPS = torch.finfo(torch.float32).eps


def feature_richness(logits: Tensor, centerness: Optional[Tensor] = None) -> Tensor:
    """The score S: the teacher's highest class probability at each location.

    Args:
        logits: (N, A·K, h, w), sigmoid class logits of the teacher.
        centerness: (N, 1, h, w) logits; if given, S is multiplied by their sigmoid. (A variant
            found in the authors' development code, not in their release.)

    Returns:
        (N, h, w), in (0, 1), without gradient.
    """
    score = logits.detach().float().amax(dim=1).sigmoid()
    if centerness is not None:
        score = score * centerness.detach().float().squeeze(1).sigmoid()
    return score


def _mean_over_score(value: Tensor, score: Tensor) -> Tensor:
    """Sum of value (N, C, h, w) over channels and locations, weighted with score (N, h, w), over
    the sum of the score. Not divided by C."""
    return (value.sum(dim=1) * score).sum() / score.sum().clamp(min=EPS)


def richness_imitation(adapted: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
    """Squared feature difference, weighted with the score: one level of L_feat before α.

    Args:
        adapted: (N, C, h, w), student features after the adapter.
        teacher: (N, C, h, w), teacher features.
        score: (N, h, w), from :func:`feature_richness`.

    Returns:
        scalar: Σ S · Σ_c (t − φ(s))² / Σ S. Summed over channels, not averaged.
    """
    difference = F.mse_loss(adapted.float(), teacher.detach().float(), reduction="none")
    return _mean_over_score(difference, score)


def richness_classification(
    student_logits: Tensor, teacher_logits: Tensor, score: Tensor
) -> Tensor:
    """Binary cross-entropy with the teacher's probabilities: one level of L_head before β.

    Args:
        student_logits: (N, A·K, h, w).
        teacher_logits: (N, A·K, h, w).
        score: (N, h, w), from :func:`feature_richness`.

    Returns:
        scalar: Σ S · Σ_k BCE(σ(z_s), σ(z_t)) / Σ S. Its minimum is the teacher's entropy, not 0.
    """
    loss = F.binary_cross_entropy_with_logits(
        student_logits.float(), teacher_logits.detach().float().sigmoid(), reduction="none"
    )
    return _mean_over_score(loss, score)


@DISTILLER_REGISTRY.register()
class FRS(Distiller):
    """Imitation of FPN levels and class predictions where the teacher's class score is high.

    On two-stage detectors the score and the predictions are the RPN's objectness.
    """

    requires = {
        "feature": Needs(student=("features",), teacher=("features", "dense")),
        "cls": Needs(student=("dense",), teacher=("dense",)),
    }

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[Tuple[int, int]],
        channels: Sequence[Tuple[int, int]],
        terms: Sequence[str] = ("feature", "cls"),
        centerness: bool = False,
    ):
        """
        Args:
            levels: (student, teacher) indices of the FPN levels of equal stride, finest first.
            channels: (student, teacher) channels of these levels.
            terms: which of "feature" and "cls" to compute.
            centerness: multiply the score by the teacher's centerness.
        """
        super().__init__(terms, num_levels=len(levels))
        self.levels = list(levels)
        self.centerness = centerness
        self.adapters = conv_adapters(channels) if "feature" in terms else nn.ModuleList()

    @classmethod
    def default_config(cls) -> CfgNode:
        node = CfgNode()
        # α and β of the released RetinaNet config; they differ by detector, see configs/frs
        node.FEATURE = term_config(weight=0.005, warmup_iters=500)
        node.CLS = term_config(weight=0.02, warmup_iters=500)
        # Multiply the score by the teacher's centerness (authors' development code, not released)
        node.CENTERNESS = False
        return node

    @classmethod
    def from_config(cls, cfg, student, teacher) -> Dict:
        node, terms = cls.node(cfg), cls.enabled_terms(cfg)
        if node.CENTERNESS and not teacher.dense_head.has_centerness:
            raise UserError(
                f"DISTILL.FRS.CENTERNESS is True, but the teacher ({teacher.name}) predicts no "
                "centerness: set it to False or take an FCOS or ATSS teacher"
            )
        if "cls" in terms:
            student.dense_head.check_same_outputs(teacher.dense_head, "DISTILL.FRS.CLS.WEIGHT")
        levels = paired_levels(student, teacher, "DISTILL.FRS")
        return {
            "levels": levels,
            "channels": [
                (student.levels[i].channels, teacher.levels[j].channels) for i, j in levels
            ],
            "terms": terms,
            "centerness": node.CENTERNESS,
        }

    def forward(self, student, teacher, targets) -> Dict[str, Tensor]:
        scores = self.scores(teacher)
        losses = {}
        if self.wants("feature"):
            features_s = list(student.features.values())
            features_t = list(teacher.features.values())
            losses["feature"] = torch.stack(
                [
                    richness_imitation(adapter(features_s[i]), features_t[j], score)
                    for adapter, (i, j), score in zip(self.adapters, self.levels, scores)
                ]
            )
        if self.wants("cls"):
            logits_s, logits_t = student.dense.logits, teacher.dense.logits
            losses["cls"] = torch.stack(
                [
                    richness_classification(logits_s[i], logits_t[j], score)
                    for (i, j), score in zip(self.levels, scores)
                ]
            )
        return losses

    def scores(self, teacher) -> List[Tensor]:
        """The score of each paired level, (N, h, w) each."""
        dense = teacher.dense
        return [
            feature_richness(dense.logits[j], dense.centerness[j] if self.centerness else None)
            for _, j in self.levels
        ]

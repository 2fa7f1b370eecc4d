"""FRS: Distilling Object Detectors with Feature Richness (Du et al., NeurIPS 2021,
https://arxiv.org/abs/2111.00674).

The teacher's class scores say where features are rich. That score weights the imitation of FPN
levels, and of class predictions. Formulas follow the authors' released code, with which second-hand
transcriptions of the paper agree: docs/methods/frs.md.

Shapes: N images, C channels, A anchors per location, K classes, (h, w) the size of a level,
L levels.
"""

from typing import Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.layers import as_float, as_target
from d2kd.methods.core import DISTILLER_REGISTRY, Defaults, Distiller, conv_adapters, term
from d2kd.schema import Key
from d2kd.views import (
    Dense,
    Family,
    Features,
    LevelPair,
    Reads,
    StudentView,
    TeacherView,
    channels_of,
    paired_levels,
)
from d2kd.views.comparable import ANCHORS, HEAD_CLASSES, check_same, check_same_anchors

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
    score = as_float(logits.detach()).amax(dim=1).sigmoid()
    if centerness is not None:
        score = score * as_float(centerness.detach()).squeeze(1).sigmoid()
    return score


def richness_imitation(adapted: Tensor, teacher: Tensor, score: Tensor) -> Tensor:
    """Squared feature difference, weighted with the score: one level of L_feat before α.

    Args:
        adapted: (N, C, h, w), student features after the adapter.
        teacher: (N, C, h, w), teacher features.
        score: (N, h, w), from :func:`feature_richness`.

    Returns:
        scalar: Σ S · Σ_c (t − φ(s))² / Σ S. Summed over channels, not averaged.
    """
    difference = F.mse_loss(as_float(adapted), as_target(teacher, adapted), reduction="none")
    return (difference.sum(dim=1) * score).sum() / score.sum().clamp(min=EPS)


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
    # Weighted and summed by the loss itself, as these are the widest maps of a step
    loss = F.binary_cross_entropy_with_logits(
        as_float(student_logits),
        as_target(teacher_logits, student_logits).sigmoid(),
        weight=score[:, None],
        reduction="sum",
    )
    return loss / score.sum().clamp(min=EPS)


@DISTILLER_REGISTRY.register()
class FRS(Distiller):
    """Imitation of FPN levels and class predictions where the teacher's class score is high.

    On two-stage detectors the score and the predictions are the RPN's objectness.
    """

    keys = {
        "FEATURE": term(
            0.005,
            "Weight of the feature loss (α); the authors' value for RetinaNet, others for other "
            "detectors",
            warmup_iters=500,
        ),
        "CLS": term(
            0.02,
            "Weight of the class loss (β); the authors' value for RetinaNet, others for other "
            "detectors",
            warmup_iters=500,
        ),
        "CENTERNESS": Key(
            False,
            "Multiply the score by the teacher's centerness (authors' development code, not "
            "released)",
        ),
    }

    defaults_of = {
        "GeneralizedRCNN": Defaults(
            {"FEATURE.WEIGHT": 0.002, "CLS.WEIGHT": 0.1}, "the authors', for Faster R-CNN"
        ),
        "RetinaNet": Defaults(
            {"FEATURE.WEIGHT": 0.005, "CLS.WEIGHT": 0.02}, "the authors', for RetinaNet"
        ),
        "FCOS": Defaults({"FEATURE.WEIGHT": 0.01, "CLS.WEIGHT": 0.05}, "the authors', for FCOS"),
        "PaperFCOS": Defaults({"FEATURE.WEIGHT": 0.01, "CLS.WEIGHT": 0.05}, "the authors'"),
        "GFL": Defaults({"FEATURE.WEIGHT": 0.1, "CLS.WEIGHT": 0.05}, "the authors', for GFL"),
    }

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        terms: Sequence[str],
        centerness: bool,
    ):
        """
        Args:
            levels: (student, teacher) FPN levels of equal stride, finest first.
            terms: which of "feature" and "cls" to compute.
            centerness: multiply the score by the teacher's centerness.
        """
        super().__init__(terms, num_levels=len(levels))
        self.levels = list(levels)
        self.centerness = centerness
        self.adapters = nn.ModuleList()
        if "feature" in terms:
            self.adapters = conv_adapters(channels_of(levels))

    @classmethod
    def reads(cls, node: CfgNode, student: Family, teacher: Family) -> Dict[str, Reads]:
        logits, head = Dense(("logits",)), teacher.dense_head
        score, knobs = logits, {}
        if node.CENTERNESS:
            score, knobs = Dense(("logits", "centerness")), {Dense: "CENTERNESS"}
        # An RPN's class is any object, whatever the classes of its detector
        any_object = bool(head and head.class_agnostic)
        reads = {
            "feature": Reads((Features(),), (Features(), score), knobs, any_classes=True),
            "cls": Reads((logits,), (score,), knobs, any_classes=any_object),
        }
        return {term: reads[term] for term in cls.enabled_terms(node)}

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        return {
            "levels": paired_levels(student, teacher, cls.node_name()),
            "terms": cls.enabled_terms(cfg),
            "centerness": cfg.CENTERNESS,
        }

    @classmethod
    def check_pair(cls, node: CfgNode, student: Family, teacher: Family) -> None:
        if "cls" in cls.enabled_terms(node):
            check_same(student, teacher, (HEAD_CLASSES, ANCHORS), cls.term_key("cls"))
            levels = paired_levels(student, teacher, cls.node_name())
            check_same_anchors(student, teacher, levels, cls.term_key("cls"))

    def forward(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Tensor]:
        scores = self.scores(teacher)
        losses = {}
        if self.wants("feature"):
            losses["feature"] = torch.stack(
                [
                    richness_imitation(
                        adapter(student.features[ours.name]), teacher.features[theirs.name], score
                    )
                    for adapter, (ours, theirs), score in zip(self.adapters, self.levels, scores)
                ]
            )
        if self.wants("cls"):
            logits_s, logits_t = student.predictions.logits, teacher.predictions.logits
            losses["cls"] = torch.stack(
                [
                    richness_classification(logits_s[ours.index], logits_t[theirs.index], score)
                    for (ours, theirs), score in zip(self.levels, scores)
                ]
            )
        return losses

    def maps(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Dict[str, Tensor]]:
        names = [ours.name for ours, _ in self.levels]
        return {"the teacher's score": dict(zip(names, self.scores(teacher)))}

    def scores(self, teacher: TeacherView) -> List[Tensor]:
        """The score of each paired level, (N, h, w) each."""
        predictions = teacher.predictions
        return [
            feature_richness(
                predictions.logits[i], predictions.centerness[i] if self.centerness else None
            )
            for i in (theirs.index for _, theirs in self.levels)
        ]

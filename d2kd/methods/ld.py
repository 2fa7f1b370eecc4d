"""LD: Localization Distillation for Dense Object Detection (Zheng et al., CVPR 2022,
https://arxiv.org/abs/2102.12252): distributions of box sides learn from the teacher's.

Of the paper's two regions only the main one is here: the anchors that learn an object. The valuable
localization region needs overlaps and thresholds, which an assignment does not tell. The formula is
that of the authors' released code but for the division by the number of images, which is ours
(docs/methods/ld.md).

Shapes: N images, A anchors per location, K classes, B bins per box side, (h, w) the size of a
level, L levels.
"""

from typing import Dict, List, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from d2kd.errors import UserError
from d2kd.layers import box_distribution_kl, flatten_scalars, highest_logits
from d2kd.methods.core import DISTILLER_REGISTRY, Distiller, term
from d2kd.schema import Key
from d2kd.views import (
    Assignment,
    Dense,
    Family,
    Reads,
    StudentView,
    TeacherView,
)
from d2kd.views.comparable import ANCHORS, BINS, LEVELS, check_same


def main_region_weights(logits: Tensor, positive: Tensor, num_anchors: int) -> Tensor:
    """How much each anchor of a level counts: the student's highest class probability in the main
    region, 0 outside.

    Args:
        logits: (N, A·K, h, w), sigmoid class logits of the student.
        positive: (N, h·w·A) bool, anchors that learn an object.
        num_anchors: A.

    Returns:
        (N, h·w·A) in [0, 1], float32, without gradient.
    """
    return highest_logits(logits, num_anchors).sigmoid() * positive


def localization_distillation(
    deltas: Tensor, teacher_deltas: Tensor, weights: Tensor, num_anchors: int, temperature: float
) -> Tensor:
    """One level of the loss.

    Args:
        deltas: (N, A·4·B, h, w), logits of the student's distributions.
        teacher_deltas: the same of the teacher; gets no gradient.
        weights: (N, h·w·A), from :func:`main_region_weights`.
        num_anchors: A.
        temperature: T, divides all logits.

    Returns:
        scalar: 1/N · Σ weight · T² · KL(teacher, student) / B, the mean over the four sides, summed
        over anchors. (The released code takes the mean over bins, too, and does not divide by N.)
    """
    num_bins = deltas.shape[1] // (4 * num_anchors)
    loss = box_distribution_kl(deltas, teacher_deltas, num_anchors, temperature) / num_bins
    return (flatten_scalars(loss) * weights).sum() / len(deltas)


@DISTILLER_REGISTRY.register()
class LD(Distiller):
    """Box distributions of the anchors that learn an object, towards the teacher's. For detectors
    that predict such distributions: GFL."""

    caveat = "the main region alone is distilled; the default weight is that for 3 images per GPU"

    keys = {
        "BBOX": term(
            0.75,
            "Weight of the loss of box distributions, where there are objects; the authors' 0.25, "
            "times the 3 images per GPU that they sum over and d2kd averages over",
        ),
        "TEMPERATURE": Key(
            10.0, "Temperature of the softmax over bins (T); the authors' value", above=0
        ),
    }

    @configurable
    def __init__(
        self,
        *,
        num_levels: int,
        num_anchors: int,
        terms: Sequence[str],
        temperature: float,
    ):
        """
        Args:
            num_levels: L.
            num_anchors: A.
            terms: "bbox".
            temperature: softens both distributions.
        """
        super().__init__(terms, num_levels)
        self.num_anchors = num_anchors
        self.temperature = temperature

    @classmethod
    def reads(cls, node: CfgNode, student: Family, teacher: Family) -> Dict[str, Reads]:
        ours, theirs = Dense(("logits", "deltas")), Dense(("deltas",))
        return {"bbox": Reads((ours, Assignment()), (theirs,), any_classes=True)}

    @classmethod
    def check_pair(cls, node: CfgNode, student: Family, teacher: Family) -> None:
        for side, family in (("student", student), ("teacher", teacher)):
            if family.box_form != "distribution":
                raise UserError(
                    f"{cls.node_name()} compares distributions of box sides, but the {side} "
                    f"{family.name} predicts {family.box_form or 'none'}: take GFL on both sides, "
                    "or leave LD out of DISTILL.METHODS"
                )
        check_same(student, teacher, (LEVELS, ANCHORS, BINS), cls.node_name())

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        return {
            "num_levels": len(student.levels),
            "num_anchors": student.dense_head.num_anchors,
            "terms": cls.enabled_terms(cfg),
            "temperature": cfg.TEMPERATURE,
        }

    def forward(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Tensor]:
        logits, deltas, _ = student.predictions
        assignment = student.assignment
        positive = assignment.positive.split(assignment.sizes, dim=1)
        losses = []
        levels = zip(logits, positive, deltas, teacher.predictions.deltas)
        for class_logits, in_main_region, ours, theirs in levels:
            weights = main_region_weights(class_logits, in_main_region, self.num_anchors)
            losses.append(
                localization_distillation(ours, theirs, weights, self.num_anchors, self.temperature)
            )
        return {"bbox": torch.stack(losses)}

"""PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient (Cao
et al., NeurIPS 2022, https://arxiv.org/abs/2207.02039): imitation of standardised FPN levels.

Shapes: N images, C channels, (h, w) the size of an FPN level, L levels.
"""

import math
from typing import Dict, List, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from d2kd.layers import MAX_GAIN, as_target, transfer_statistics
from d2kd.methods.core import DISTILLER_REGISTRY, Defaults, Distiller, matching_adapters, term
from d2kd.views import (
    Family,
    Features,
    LevelPair,
    Reads,
    StudentView,
    TeacherView,
    channels_of,
    paired_levels,
)


def standardize(features: Tensor, max_gain: float = math.inf) -> Tensor:
    """(N, C, h, w) -> the same with mean 0 and standard deviation 1 in every channel; less, where
    that would stretch a channel by more than ``max_gain``."""
    zero = torch.zeros(1, device=features.device)
    return transfer_statistics(features, mean=zero, std=zero + 1, max_gain=max_gain)


def pearson_imitation(student: Tensor, teacher: Tensor, max_gain: float = math.inf) -> Tensor:
    """One level of the loss.

    Args:
        student, teacher: (N, C, h, w); the teacher gets no gradient.
        max_gain: a channel of the student is stretched by this at most.

    Returns:
        scalar: half the mean squared difference of the standardised maps, which is 1 minus the
        mean of the channels' Pearson correlations.
    """
    ours = standardize(student, max_gain)
    return F.mse_loss(ours, standardize(as_target(teacher, student))) / 2


@DISTILLER_REGISTRY.register()
class PKD(Distiller):
    """Imitation of FPN levels in which only the shape of each channel counts, not its scale."""

    keys = {
        "FEATURE": term(
            6.0,
            "Weight of the feature loss; the value for GFL in CrossKD's code, which has 2 for "
            "RetinaNet and FCOS, 1 for ATSS",
        )
    }

    defaults_of = {
        kind: Defaults({"FEATURE.WEIGHT": weight}, f"CrossKD's code, for {kind}")
        for kind, weight in (
            ("RetinaNet", 2.0),
            ("FCOS", 2.0),
            ("PaperFCOS", 2.0),
            ("ATSS", 1.0),
            ("GFL", 6.0),
        )
    }

    @configurable
    def __init__(self, *, levels: Sequence[LevelPair], terms: Sequence[str]):
        """
        Args:
            levels: (student, teacher) FPN levels of equal stride, finest first; where their
                channels differ, a trained 1×1 convolution maps one to the other.
            terms: "feature".
        """
        super().__init__(terms, num_levels=len(levels))
        self.levels = list(levels)
        self.adapters = matching_adapters(channels_of(levels))

    @classmethod
    def reads(cls, node: CfgNode, student: Family, teacher: Family) -> Dict[str, Reads]:
        return {"feature": Reads(student=(Features(),), teacher=(Features(),))}

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        return {
            "levels": paired_levels(student, teacher, cls.node_name()),
            "terms": cls.enabled_terms(cfg),
        }

    def forward(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Tensor]:
        losses = [
            pearson_imitation(
                adapter(student.features[ours.name]), teacher.features[theirs.name], MAX_GAIN
            )
            for adapter, (ours, theirs) in zip(self.adapters, self.levels)
        ]
        return {"feature": torch.stack(losses)}

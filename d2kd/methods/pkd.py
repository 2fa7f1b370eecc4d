"""PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient (Cao
et al., NeurIPS 2022, https://arxiv.org/abs/2207.02039): imitation of standardised FPN levels.

Shapes: N images, C channels, (h, w) the size of an FPN level, L levels.
"""

from typing import Dict, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.methods.distiller import DISTILLER_REGISTRY, Distiller, Needs
from d2kd.methods.schedule import term_config
from d2kd.modeling.channel_statistics import transfer_statistics
from d2kd.modeling.families import paired_levels


def standardize(features: Tensor) -> Tensor:
    """(N, C, h, w) -> the same with mean 0 and standard deviation 1 in every channel."""
    zero = torch.zeros(1, device=features.device)
    return transfer_statistics(features, mean=zero, std=zero + 1)


def pearson_imitation(student: Tensor, teacher: Tensor) -> Tensor:
    """One level of the loss.

    Args:
        student, teacher: (N, C, h, w); the teacher gets no gradient.

    Returns:
        scalar: half the mean squared difference of the standardised maps, which is 1 minus the
        mean of the channels' Pearson correlations.
    """
    return F.mse_loss(standardize(student), standardize(teacher.detach())) / 2


@DISTILLER_REGISTRY.register()
class PKD(Distiller):
    """Imitation of FPN levels in which only the shape of each channel counts, not its scale."""

    requires = {"feature": Needs(student=("features",), teacher=("features",))}

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[Tuple[int, int]],
        channels: Sequence[Tuple[int, int]],
        terms: Sequence[str] = ("feature",),
    ):
        """
        Args:
            levels: (student, teacher) indices of the FPN levels of equal stride, finest first.
            channels: (student, teacher) channels of these levels; where they differ, a trained
                1×1 convolution maps one to the other.
            terms: "feature".
        """
        super().__init__(terms, num_levels=len(levels))
        self.levels = list(levels)
        self.adapters = nn.ModuleList(
            nn.Identity() if c_s == c_t else nn.Conv2d(c_s, c_t, 1) for c_s, c_t in channels
        )

    @classmethod
    def default_config(cls) -> CfgNode:
        node = CfgNode()
        # For GFL; 2 for RetinaNet and FCOS, 1 for ATSS
        node.FEATURE = term_config(weight=6.0)
        return node

    @classmethod
    def from_config(cls, cfg: CfgNode, student, teacher) -> Dict:
        levels = paired_levels(student, teacher, "DISTILL.PKD")
        return {
            "levels": levels,
            "channels": [
                (student.levels[i].channels, teacher.levels[j].channels) for i, j in levels
            ],
            "terms": cls.enabled_terms(cfg),
        }

    def forward(self, student, teacher, targets) -> Dict[str, Tensor]:
        features_s, features_t = list(student.features.values()), list(teacher.features.values())
        losses = [
            pearson_imitation(adapter(features_s[i]), features_t[j])
            for adapter, (i, j) in zip(self.adapters, self.levels)
        ]
        return {"feature": torch.stack(losses)}

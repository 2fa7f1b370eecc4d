"""MGD: Masked Generative Distillation (Yang et al., ECCV 2022, https://arxiv.org/abs/2205.01529).

Random locations of the student's FPN levels are masked, and a small generator has to make the
teacher's whole level from the rest. Formula and values are those of the authors' released code;
that FPN levels are paired by stride is our reading.

Shapes: N images, C channels, (h, w) the size of an FPN level, L levels.
"""

from typing import Dict, List, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.layers import as_float, as_target
from d2kd.methods.core import DISTILLER_REGISTRY, Defaults, Distiller, matching_adapters, term
from d2kd.schema import Key
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


def mask_locations(features: Tensor, ratio: float) -> Tensor:
    """Sets random locations to 0, each with the same probability and in all of its channels.

    Args:
        features: (N, C, h, w).
        ratio: the probability, in [0, 1).

    Returns:
        (N, C, h, w). Draws N·h·w numbers from torch's global generator of the device.
    """
    n, _, h, w = features.shape
    return features.masked_fill(torch.rand(n, 1, h, w, device=features.device) < ratio, 0)


def build_generator(channels: int) -> nn.Sequential:
    """(N, C, h, w) -> (N, C, h, w): two 3×3 convolutions with a ReLU in between."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def generative_imitation(generated: Tensor, teacher: Tensor) -> Tensor:
    """One level of the loss before α.

    Args:
        generated: (N, C, h, w), what the generator made of the student's masked level.
        teacher: (N, C, h, w); gets no gradient.

    Returns:
        scalar: 1/N · Σ (generated − teacher)², summed over channels and all locations, masked or
        not.
    """
    total = F.mse_loss(as_float(generated), as_target(teacher, generated), reduction="sum")
    return total / len(generated)


@DISTILLER_REGISTRY.register()
class MGD(Distiller):
    """Imitation of FPN levels that have to be generated from a part of the student's locations."""

    keys = {
        "FEATURE": term(
            2e-5,
            "Weight of the feature loss (α); the authors' value for one-stage detectors, 5e-7 for "
            "two-stage ones",
        ),
        "MASK_RATIO": Key(
            0.65,
            "Share of locations that are masked (λ); the authors' value for one-stage detectors, "
            "0.45 for two-stage ones",
            low=0,
            high=0.99,
        ),
    }

    defaults_of = {
        **{
            kind: Defaults({"FEATURE.WEIGHT": 2e-5, "MASK_RATIO": 0.65}, "the authors', one-stage")
            for kind in ("RetinaNet", "FCOS", "PaperFCOS", "ATSS", "GFL")
        },
        "GeneralizedRCNN": Defaults(
            {"FEATURE.WEIGHT": 5e-7, "MASK_RATIO": 0.45}, "the authors', two-stage"
        ),
    }

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        terms: Sequence[str],
        mask_ratio: float,
    ):
        """
        Args:
            levels: (student, teacher) FPN levels of equal stride, finest first; each has a
                generator, and a 1×1 convolution before it where the channels differ.
            terms: "feature".
            mask_ratio: share of the locations that are masked.
        """
        super().__init__(terms, num_levels=len(levels))
        self.levels = list(levels)
        self.mask_ratio = mask_ratio
        self.adapters = matching_adapters(channels_of(levels))
        self.generators = nn.ModuleList(build_generator(c_t) for _, c_t in channels_of(levels))

    @classmethod
    def reads(cls, node: CfgNode, student: Family, teacher: Family) -> Dict[str, Reads]:
        return {"feature": Reads(student=(Features(),), teacher=(Features(),))}

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        return {
            "levels": paired_levels(student, teacher, cls.node_name()),
            "terms": cls.enabled_terms(cfg),
            "mask_ratio": cfg.MASK_RATIO,
        }

    def forward(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Tensor]:
        losses = []
        for adapter, generator, (ours, theirs) in zip(self.adapters, self.generators, self.levels):
            masked = mask_locations(adapter(student.features[ours.name]), self.mask_ratio)
            losses.append(generative_imitation(generator(masked), teacher.features[theirs.name]))
        return {"feature": torch.stack(losses)}

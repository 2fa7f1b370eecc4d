"""Semantic-guided feature imitation: the student's levels, softly matched with the one level from
which the teacher pools a region.

Shapes: L student levels, R regions, C channels of the teacher's levels, (r, r) a pooled region,
d numbers per key.
"""

import math
from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from d2kd.methods.channel_statistics import as_float
from d2kd.methods.defeat import object_masks
from d2kd.methods.log import log_sometimes
from d2kd.modeling.families import Level

# Range of the learned temperature
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e2


def match_levels(student_keys: Tensor, teacher_keys: Tensor, temperature) -> Tensor:
    """How well each student level fits the teacher's region: softmax over levels of the products
    of their keys.

    Args:
        student_keys: (L, R, d).
        teacher_keys: (R, d).
        temperature: τ > 0, a number or a scalar tensor.

    Returns:
        (L, R), float32; sums to 1 over the levels.
    """
    products = (as_float(student_keys) * as_float(teacher_keys)).sum(dim=2)
    return (products / temperature).softmax(dim=0)


class SemanticGuidedImitation(nn.Module):
    """Pools every region from every student level, and lets their weighted sum imitate the region
    that the teacher pools.

    Attributes:
        levels: the student's levels that are pooled.
        soft: whether levels are matched by keys. If not, a region is pooled from the one student
            level that its size assigns it to, which leaves keys and temperature out.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        channels: int,
        resolution: Tuple[int, int],
        *,
        soft: bool = True,
        embed_dims: Sequence[int] = (128, 64),
        final_relu: bool = True,
        adapter_per_level: bool = False,
        initial_temperature: float = 1.0,
        mean_reduction: bool = True,
    ):
        """
        Args:
            levels: the student's, finest first; without ``soft``, of consecutive strides.
            channels: C.
            resolution: (r, r) of the teacher's pooler.
            soft: see the class.
            embed_dims: widths of the 3×3 convolutions of stride 2 that make a key.
            final_relu: whether the last of them has a ReLU, too.
            adapter_per_level: one adapter per level instead of one for all.
            initial_temperature: what τ starts from.
            mean_reduction: mean over all elements; otherwise over regions alone.
        """
        super().__init__()
        self.levels = list(levels)
        self.soft = soft
        self.mean_reduction = mean_reduction
        scales = [1 / level.stride for level in levels]
        self.poolers = nn.ModuleList(
            ROIPooler(resolution, group, sampling_ratio=0, pooler_type="ROIAlignV2")
            for group in ([[s] for s in scales] if soft else [scales])
        )
        widths = {level.channels for level in levels}
        assert len(widths) == 1, f"student levels of one width are expected, not {widths}"
        self.adapters = nn.ModuleList(
            nn.Conv2d(levels[0].channels, channels, 1)
            for _ in (levels if adapter_per_level else levels[:1])
        )
        if soft:
            self.embed = _embedding(channels, embed_dims, final_relu)
            self.log_temperature = nn.Parameter(torch.tensor(math.log(initial_temperature)))

    @property
    def temperature(self) -> Tensor:
        """τ, a scalar."""
        lowest, highest = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
        return self.log_temperature.clamp(lowest, highest).exp()

    def forward(self, features: Dict[str, Tensor], boxes: List[Boxes], target: Tensor) -> Tensor:
        """
        Args:
            features: the student's levels by name.
            boxes: per image, in pixels of the padded batch.
            target: (R, C, r, r), what the teacher pools; gets no gradient.

        Returns:
            mean squared difference, a scalar; 0 without regions.
        """
        target = as_float(target.detach())
        adapted = self.adapted([features[level.name] for level in self.levels], boxes)
        if self.soft:
            keys = self.embed(adapted.flatten(0, 1)).flatten(1).unflatten(0, adapted.shape[:2])
            weights = match_levels(keys, self.embed(target).flatten(1), self.temperature)
            log_sometimes(lambda: self.numbers(weights))
            with torch.autocast(adapted.device.type, enabled=False):
                merged = torch.einsum("lr,lrcyx->rcyx", weights, as_float(adapted))
        else:
            merged = as_float(adapted[0])
        squared = (merged - target).square()
        count = squared.numel() if self.mean_reduction else len(squared)
        return squared.sum() / max(count, 1)

    def adapted(self, levels: List[Tensor], boxes: List[Boxes]) -> Tensor:
        """(L, R, C, r, r), or (1, R, C, r, r) without soft matching."""
        shared = len(self.adapters) == 1
        if not self.soft:
            if not shared:
                levels = [adapter(x) for adapter, x in zip(self.adapters, levels)]
            pooled = self.poolers[0](levels, boxes)
            return (self.adapters[0](pooled) if shared else pooled)[None]
        pooled = [pooler([x], boxes) for pooler, x in zip(self.poolers, levels)]
        adapters = list(self.adapters) * (len(levels) if shared else 1)
        return torch.stack([adapter(x) for adapter, x in zip(adapters, pooled)])

    @torch.no_grad()
    def numbers(self, weights: Tensor) -> Dict[str, Tensor]:
        """What is logged: mean weight of every level, mean entropy (0 ... log L), τ."""
        count = max(weights.shape[1], 1)
        shares = weights.sum(dim=1) / count
        entropy = torch.special.entr(weights).sum() / count
        return {
            **{f"gdetkd_sgfi/{lv.name}": share for lv, share in zip(self.levels, shares)},
            "gdetkd_sgfi/entropy": entropy,
            "gdetkd_sgfi/temperature": self.temperature,
        }


def _embedding(channels: int, widths: Sequence[int], final_relu: bool) -> nn.Sequential:
    layers = []
    for c_in, c_out in zip([channels, *widths], widths):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*(layers if final_relu else layers[:-1]))


class MaskedImitation(nn.Module):
    """What soft matching is compared with: the levels of equal stride imitate each other inside of
    the objects' boxes."""

    def __init__(self, levels: Sequence[Tuple[Level, Level]]):
        """
        Args:
            levels: (student, teacher) levels of equal stride, finest first.
        """
        super().__init__()
        self.levels = list(levels)
        ours, theirs = levels[0]
        self.adapter = nn.Conv2d(ours.channels, theirs.channels, 1)

    def forward(
        self, features: Dict[str, Tensor], target: Dict[str, Tensor], boxes: List[Boxes]
    ) -> Tensor:
        """
        Args:
            features, target: levels of student and teacher by name; the target gets no gradient.
            boxes: objects per image.

        Returns:
            mean squared difference over channels and all cells that a box covers, a scalar.
        """
        ours = [self.adapter(features[level.name]) for level, _ in self.levels]
        masks = object_masks(
            [b.tensor for b in boxes],
            [x.shape[-2:] for x in ours],
            [level.stride for level, _ in self.levels],
            assign="all_levels",
        )
        total, count = 0.0, 0.0
        for x, (_, level), mask in zip(ours, self.levels, masks):
            squared = (as_float(x) - as_float(target[level.name].detach())).square()
            total = total + (squared.mean(dim=1) * mask).sum()
            count = count + mask.sum()
        return total / count.clamp(min=1)

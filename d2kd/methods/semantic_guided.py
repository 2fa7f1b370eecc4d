"""Semantic-guided feature imitation: the student's levels, softly matched with the one level from
which the teacher pools a region.

Shapes: L levels that are matched, R regions, C channels of the teacher's levels, (r, r) a pooled
region, d numbers per key.
"""

import math
from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from d2kd.methods.defeat import object_masks
from d2kd.methods.log import log_sometimes
from d2kd.modeling.channel_statistics import as_float
from d2kd.modeling.families import Level

# Range of the learned temperature
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e2


def match_levels(student_keys: Tensor, teacher_keys: Tensor, temperature) -> Tensor:
    """How well each student level fits the teacher's region: softmax over levels of the products
    of their keys. The other way round, with L teacher levels, if the two are swapped.

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
    """Pools every region from all levels of the student and from the one level of its size of the
    teacher. The weighted sum of the student's, in which a level counts the more the better its key
    fits the teacher's, imitates the teacher's. Two variants: the sum is over the teacher's levels,
    and there is no sum, but one level on both sides.

    Attributes:
        matched: the levels that are weighted, if there are any.
        weighs_teacher: whether these are the teacher's.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        channels: int,
        resolution: Tuple[int, int],
        *,
        soft: bool = True,
        teacher_levels: Sequence[Level] = (),
        detach_weights: bool = False,
        embed_dims: Sequence[int] = (128, 64),
        final_relu: bool = True,
        adapter_per_level: bool = False,
        initial_temperature: float = 1.0,
        mean_reduction: bool = True,
    ):
        """
        Args:
            levels: the student's, finest first; of consecutive strides where a region's size
                chooses one of them.
            channels: C.
            resolution: (r, r) of the teacher's pooler.
            soft: weight levels. Otherwise there are neither keys nor a temperature.
            teacher_levels: weight these instead of the student's.
            detach_weights: no gradient goes through the weights; nothing trains keys and τ then.
            embed_dims: widths of the 3×3 convolutions of stride 2 that make a key.
            final_relu: whether the last of them has a ReLU, too.
            adapter_per_level: one adapter per level instead of one for all.
            initial_temperature: what τ starts from.
            mean_reduction: mean over all elements; otherwise over regions alone.
        """
        super().__init__()
        self.levels = list(levels)
        self.matched = list(teacher_levels or levels) if soft else []
        self.weighs_teacher = bool(teacher_levels)
        self.detach_weights = detach_weights
        self.mean_reduction = mean_reduction
        self._pools_each = soft and not teacher_levels
        self.poolers = _poolers([[x] for x in levels] if self._pools_each else [levels], resolution)
        self.teacher_poolers = _poolers([[x] for x in teacher_levels], resolution)
        widths = {level.channels for level in levels}
        assert len(widths) == 1, f"student levels of one width are expected, not {widths}"
        self.adapters = nn.ModuleList(
            nn.Conv2d(levels[0].channels, channels, 1)
            for _ in (levels if adapter_per_level else levels[:1])
        )
        if soft:
            self.embed = _embedding(channels, embed_dims, final_relu)
            self.log_temperature = nn.Parameter(torch.tensor(math.log(initial_temperature)))
            # DistributedDataParallel waits for every parameter that is not frozen.
            self.embed.requires_grad_(not detach_weights)
            self.log_temperature.requires_grad_(not detach_weights)

    @property
    def temperature(self) -> Tensor:
        """τ, a scalar."""
        return self.log_temperature.exp()

    def forward(self, features: Dict[str, Tensor], boxes: List[Boxes], target: Tensor) -> Tensor:
        """
        Args:
            features: the student's levels by name.
            boxes: per image, in pixels of the padded batch.
            target: (R, C, r, r), what the teacher pools; (L, R, C, r, r) of :meth:`pool_teacher`
                if the teacher's levels are weighted. Gets no gradient.

        Returns:
            mean squared difference, a scalar; 0 without regions.
        """
        many, one = self.sides(features, boxes, target)
        if self.matched:
            self.clamp_temperature()
            weights = self.weights(many, one)
            log_sometimes(lambda: self.numbers(weights))
            with torch.autocast(many.device.type, enabled=False):
                merged = torch.einsum("lr,lrcyx->rcyx", weights, as_float(many))
        else:
            merged = as_float(many[0])
        squared = (merged - as_float(one)).square()
        count = squared.numel() if self.mean_reduction else len(squared)
        return squared.sum() / max(count, 1)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Brings τ back to its range after the optimizer's step. (Were it clamped where it is used,
        it would get no gradient outside, and stay there.)"""
        self.log_temperature.clamp_(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))

    def sides(
        self, features: Dict[str, Tensor], boxes: List[Boxes], target: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """What :meth:`forward` compares: the side with L levels (L, R, C, r, r), and the other
        (R, C, r, r). Arguments as there."""
        ours, theirs = self.pool_student(features, boxes), as_float(target.detach())
        return (theirs, ours[0]) if self.weighs_teacher else (ours, theirs)

    def weights(self, many: Tensor, one: Tensor) -> Tensor:
        """How much each level counts: (L, R), sums to 1 over the levels."""
        keys = self.embed(many.flatten(0, 1)).flatten(1).unflatten(0, many.shape[:2])
        weights = match_levels(keys, self.embed(one).flatten(1), self.temperature)
        return weights.detach() if self.detach_weights else weights

    def pool_student(self, features: Dict[str, Tensor], boxes: List[Boxes]) -> Tensor:
        """Adapted regions (L, R, C, r, r); (1, R, C, r, r) where a region's size chooses the
        level."""
        levels = [features[level.name] for level in self.levels]
        shared = len(self.adapters) == 1
        if self._pools_each:
            pooled = [pooler([x], boxes) for pooler, x in zip(self.poolers, levels)]
            adapters = list(self.adapters) * (len(levels) if shared else 1)
            return torch.stack([adapter(x) for adapter, x in zip(adapters, pooled)])
        if not shared:
            levels = [adapter(x) for adapter, x in zip(self.adapters, levels)]
        pooled = self.poolers[0](levels, boxes)
        return (self.adapters[0](pooled) if shared else pooled)[None]

    def pool_teacher(self, features: Dict[str, Tensor], boxes: List[Boxes]) -> Tensor:
        """Regions (L, R, C, r, r) of the teacher's levels that are weighted."""
        levels = [features[level.name] for level in self.matched]
        pooled = [pooler([x], boxes) for pooler, x in zip(self.teacher_poolers, levels)]
        return torch.stack(pooled)

    @torch.no_grad()
    def numbers(self, weights: Tensor) -> Dict[str, Tensor]:
        """What is logged: mean weight of every level, mean entropy (0 ... log L), τ."""
        count = max(weights.shape[1], 1)
        shares = weights.sum(dim=1) / count
        entropy = torch.special.entr(weights).sum() / count
        return {
            **{f"gdetkd_sgfi/{lv.name}": share for lv, share in zip(self.matched, shares)},
            "gdetkd_sgfi/entropy": entropy,
            "gdetkd_sgfi/temperature": self.temperature,
        }


def _poolers(groups: Sequence[Sequence[Level]], resolution: Tuple[int, int]) -> nn.ModuleList:
    """One pooler per group of levels; within a group, a region's size chooses the level."""
    scales = [[1 / level.stride for level in group] for group in groups]
    return nn.ModuleList(
        ROIPooler(resolution, s, sampling_ratio=0, pooler_type="ROIAlignV2") for s in scales
    )


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

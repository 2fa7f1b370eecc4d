"""The feature term of G-DetKD in its variants: levels softly matched with the one level from which
the teacher pools a region (of the student, or the other way round), the one level of a region's
size on both sides, or no regions but the inside of objects.

Shapes: L levels that are matched, R regions, C channels of the teacher's levels, (r, r) a pooled
region, d numbers per key.
"""

import math
from functools import partial
from typing import Callable, Dict, List, Sequence, Tuple, Union

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from d2kd.layers import SparseAlign, as_float, object_masks
from d2kd.methods.core import Diagnostics
from d2kd.views import (
    Features,
    Level,
    LevelPair,
    Read,
    Regions,
    RegionSet,
    StudentView,
    TeacherView,
    View,
)

# Range of the learned temperature
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e2
_POOLED = Regions(pooled=True)
# Regions that are pooled from all levels at once
_CHUNK = 128
# (R, 5), boxes after the number of their image -> (L, R, channels, r, r)
LevelPooler = Callable[[Tensor], Tensor]


def match_levels(
    student_keys: Tensor, teacher_keys: Tensor, temperature: Union[float, Tensor]
) -> Tensor:
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


def squared_errors(a: Tensor, b: Tensor) -> Tensor:
    """(R, ...) of both -> (R,), the mean of each region, float32."""
    errors = F.mse_loss(as_float(a), as_float(b), reduction="none")
    return errors.flatten(1).mean(dim=1)


def nothing_to_log() -> Dict[str, Tensor]:
    """The diagnostics of a variant that has none."""
    return {}


class _RegionImitation(nn.Module):
    """Base of the variants on regions: one 1×1 adapter for all of the student's levels.

    Attributes:
        teacher_reads: what of the teacher the variant imitates.
        on_regions: whether it needs regions.
    """

    teacher_reads: Tuple[Read, ...] = (_POOLED,)
    on_regions = True

    def __init__(self, levels: Sequence[Level], channels: int, resolution: Tuple[int, int]):
        """
        Args:
            levels: the student's, finest first, all of one width.
            channels: C.
            resolution: (r, r) of the teacher's pooler.
        """
        super().__init__()
        self.levels = list(levels)
        self.resolution = resolution
        self.adapter = nn.Conv2d(levels[0].channels, channels, 1)


class AssignedImitation(_RegionImitation):
    """The level of a region's size on both sides; the student's levels have consecutive strides."""

    def __init__(self, levels: Sequence[Level], channels: int, resolution: Tuple[int, int]):
        super().__init__(levels, channels, resolution)
        self.pooler = _pooler(levels, resolution)

    def forward(
        self, student: StudentView, teacher: TeacherView, regions: RegionSet
    ) -> Tuple[Tensor, Diagnostics]:
        """
        Returns:
            mean squared difference, a scalar, 0 without regions; and nothing to log.
        """
        ours = self.adapter(self.pooler(_maps(student, self.levels), regions.boxes))
        theirs = teacher.regions(regions, _POOLED).pooled
        return regions.mean(squared_errors(ours, theirs)), nothing_to_log


class SoftImitation(_RegionImitation):
    """Semantic-guided imitation: every region is pooled from each of the student's levels. Their
    weighted sum, in which a level counts the more the better its key fits the teacher's, imitates
    what the teacher pools from the one level of the region's size.

    Attributes:
        matched: the levels that are weighted.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        channels: int,
        resolution: Tuple[int, int],
        embed_dims: Sequence[int],
    ):
        """
        Args:
            levels, channels, resolution: see the base class.
            embed_dims: widths of the 3×3 convolutions of stride 2, with ReLU, that make a key.
        """
        super().__init__(levels, channels, resolution)
        self.matched = list(levels)
        self.embed = _embedding(channels, embed_dims)
        # Learned as an exponent, so that it stays above 0
        self.log_temperature = nn.Parameter(torch.zeros(()))

    @property
    def temperature(self) -> Tensor:
        """τ, a scalar."""
        return self.log_temperature.exp()

    def forward(
        self, student: StudentView, teacher: TeacherView, regions: RegionSet
    ) -> Tuple[Tensor, Diagnostics]:
        """
        Returns:
            mean squared difference, a scalar, 0 without regions; and what can be logged.
        """
        self.clamp_temperature()
        many, one = self.sides(student, teacher, regions)
        pool = self.level_pooler(many)
        # The backward pass pools again: all levels of all regions are never there at once.
        parts = [
            checkpoint(self.compare, pool, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(regions.rois.split(_CHUNK), one.split(_CHUNK))
        ]
        errors, weights = (torch.cat(x, dim=-1) for x in zip(*parts))
        return regions.mean(errors), lambda: self.diagnostics(weights, regions)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Brings τ back to its range after the optimizer's step. (Were it clamped where it is used,
        it would get no gradient outside, and stay there.)"""
        self.log_temperature.clamp_(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))

    def sides(
        self, student: StudentView, teacher: TeacherView, regions: RegionSet
    ) -> Tuple[View, Tensor]:
        """Whose levels are weighted, and what the other side pools: (R, C, r, r)."""
        return student, as_float(teacher.regions(regions, _POOLED).pooled)

    def level_pooler(self, view: View) -> LevelPooler:
        """Pools as :meth:`pool_levels` does, in the way that is fast on the view's device."""
        maps = _maps(view, self.matched)
        if maps[0].device.type == "cpu":
            return SparseAlign(maps, [level.stride for level in self.matched], self.resolution)
        return partial(self.pool_levels, maps)

    def compare(self, pool: LevelPooler, rois: Tensor, one: Tensor) -> Tuple[Tensor, Tensor]:
        """
        Args:
            pool: what :meth:`level_pooler` gives.
            rois: (R, 5), some of the regions.
            one: (R, C, r, r) of the other side.

        Returns:
            the mean squared difference between it and the weighted sum of levels, (R,); and the
            weights (L, R), without gradient.
        """
        pooled = pool(rois)
        weights = self.weights(pooled, one)
        with torch.autocast(pooled.device.type, enabled=False):
            merged = torch.einsum("lr,lrcyx->rcyx", weights, pooled)
        return squared_errors(self.adapt(merged), one), weights.detach()

    def pool_levels(self, maps: List[Tensor], rois: Tensor) -> Tensor:
        """Every region from each of the levels that are weighted: (L, R, channels, r, r)."""
        pooled = [
            ROIAlign(self.resolution, 1 / level.stride, 0)(x, rois)
            for level, x in zip(self.matched, maps)
        ]
        return torch.stack(pooled)

    def weights(self, pooled: Tensor, one: Tensor) -> Tensor:
        """How much each level counts, (L, R), sums to 1 over the levels; arguments as in
        :meth:`compare`, with what :meth:`pool_levels` gives."""
        keys = self.keys(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2])
        return match_levels(keys, self.embed(one).flatten(1), self.temperature)

    def keys(self, pooled: Tensor) -> Tensor:
        """What a level is weighed by, (R, channels, r, r) -> (R, d). Adapter and first convolution
        are linear, so they are one convolution: no region of every level has to be adapted."""
        first = self.embed[0]
        weight = torch.einsum("ocyx,cs->osyx", first.weight, self.adapter.weight[..., 0, 0])
        bias = first.bias + first.weight.sum(dim=(2, 3)) @ self.adapter.bias
        return self.embed[1:](F.conv2d(pooled, weight, bias, first.stride)).flatten(1)

    def adapt(self, merged: Tensor) -> Tensor:
        """Adapts the weighted sum: as the weights sum to 1, that is the sum of adapted levels."""
        return self.adapter(merged)

    @torch.no_grad()
    def diagnostics(self, weights: Tensor, regions: RegionSet) -> Dict[str, Tensor]:
        """What is logged: mean weight of every level, mean entropy (0 ... log L), τ."""
        shares = [regions.mean(x) for x in weights]
        entropy = torch.special.entr(weights).sum(dim=0)
        return {
            **{lv.name: share for lv, share in zip(self.matched, shares)},
            "entropy": regions.mean(entropy),
            "temperature": self.temperature,
        }


class TeacherSoftImitation(SoftImitation):
    """The other way round: the student pools a region from the one level of its size, and imitates
    the weighted sum of what the teacher pools from each of its levels."""

    teacher_reads = (Features(),)

    def __init__(
        self,
        levels: Sequence[Level],
        channels: int,
        resolution: Tuple[int, int],
        embed_dims: Sequence[int],
        *,
        teacher_levels: Sequence[Level],
    ):
        """
        Args:
            levels: the student's, of consecutive strides, finest first.
            channels, resolution, embed_dims: see :class:`SoftImitation`.
            teacher_levels: those that are weighted.
        """
        super().__init__(levels, channels, resolution, embed_dims)
        self.matched = list(teacher_levels)
        self.pooler = _pooler(levels, resolution)

    def sides(
        self, student: StudentView, teacher: TeacherView, regions: RegionSet
    ) -> Tuple[View, Tensor]:
        ours = self.pooler(_maps(student, self.levels), regions.boxes)
        return teacher, self.adapter(ours)

    def keys(self, pooled: Tensor) -> Tensor:
        return self.embed(pooled).flatten(1)

    def adapt(self, merged: Tensor) -> Tensor:
        return merged


class MaskedImitation(nn.Module):
    """What soft matching is compared with: the levels of equal stride imitate each other inside of
    the objects' boxes."""

    teacher_reads: Tuple[Read, ...] = (Features(),)
    on_regions = False

    def __init__(self, levels: Sequence[LevelPair]):
        """
        Args:
            levels: (student, teacher) levels of equal stride, finest first.
        """
        super().__init__()
        self.levels = list(levels)
        ours, theirs = levels[0]
        self.adapter = nn.Conv2d(ours.channels, theirs.channels, 1)

    def forward(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Tuple[Tensor, Diagnostics]:
        """
        Returns:
            mean squared difference over channels and all cells that a box covers, a scalar; and
            nothing to log.
        """
        ours = [self.adapter(student.features[level.name]) for level, _ in self.levels]
        theirs = [teacher.features[level.name] for _, level in self.levels]
        masks = object_masks(
            [target.gt_boxes.tensor for target in targets],
            [x.shape[-2:] for x in ours],
            [level.stride for level, _ in self.levels],
            assign="all_levels",
        )
        total, count = 0.0, 0.0
        for x, target, mask in zip(ours, theirs, masks):
            squared = (as_float(x) - as_float(target.detach())).square()
            total = total + (squared.mean(dim=1) * mask).sum()
            count = count + mask.sum()
        return total / count.clamp(min=1), nothing_to_log


def _maps(view: View, levels: Sequence[Level]) -> List[Tensor]:
    """A view's levels to pool from. A teacher's may be in half precision, to which Detectron2 would
    round the boxes as well, by pixels."""
    return [as_float(view.features[level.name]) for level in levels]


def _pooler(levels: Sequence[Level], resolution: Tuple[int, int]) -> ROIPooler:
    """Pools from the level that a region's size chooses."""
    scales = [1 / level.stride for level in levels]
    return ROIPooler(resolution, scales, sampling_ratio=0, pooler_type="ROIAlignV2")


def _embedding(channels: int, widths: Sequence[int]) -> nn.Sequential:
    layers: List[nn.Module] = []
    for c_in, c_out in zip([channels, *widths], widths):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers)

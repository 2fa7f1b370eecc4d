"""HGD (our reading of the abstract): Hands-on Guidance for Distilling Object Detectors (Qin et al.,
ICME 2021, https://arxiv.org/abs/2103.14337).

Only the abstract of the paper is public to us: it names imitation of all stage features, a
correspondence between networks, a "hands-on" imitation loss, and weights at a micro and a macro
level. Every formula and default below is our reading of these words, so no number that comes of it
is a reproduction.

Shapes: N images, C channels of the teacher, (h, w) the size of a stage, K stages.
"""

import logging
from typing import Dict, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2kd.methods.adapters import identity_adapters
from d2kd.methods.defeat import object_masks
from d2kd.methods.distances import DISTANCES, squared_scale
from d2kd.methods.distiller import DISTILLER_REGISTRY, Distiller, Needs
from d2kd.methods.grids import resize, valid_cells
from d2kd.methods.hgd_config import KEY, SOURCES, check_before_relu, check_config, hgd_config
from d2kd.methods.log import log_sometimes
from d2kd.modeling.families import Level, StagePair, trained_stage_pairs
from d2kd.modeling.meta_arch.losses import mean_over_gpus

logger = logging.getLogger(__name__)

# Only keeps 0 / 0 away: far below any activation, far above float32's smallest number.
TINY = 1e-30
# Of the running statistics
MOMENTUM = 0.99


def power_weights(strength: Tensor, power: float, valid: Tensor) -> Tensor:
    """``(a / mean a)^power`` over its own mean, with means over valid elements of each row.

    Args:
        strength: a, (N, ...), at least 0.
        power: 0 gives 1 everywhere.
        valid: same shape, 1 or 0.

    Returns:
        same shape, with mean 1 per row; 0 where not valid.
    """
    dims = tuple(range(1, strength.dim()))
    count = valid.sum(dims, keepdim=True).clamp(min=1)
    strength = (strength + TINY) * valid
    mean = strength.sum(dims, keepdim=True) / count
    weights = (strength / mean.clamp(min=TINY)).pow(power) * valid
    return weights / (weights.sum(dims, keepdim=True) / count).clamp(min=TINY)


@torch.no_grad()
def micro_weights(
    teacher: Tensor, valid: Tensor, spatial_power: float, channel_power: float
) -> Tuple[Tensor, Tensor]:
    """Weights of positions and of channels by how strongly the teacher responds there.

    Args:
        teacher: (N, C, h, w).
        valid: (N, h, w).
        spatial_power, channel_power: β_s and β_c; 0 = all 1.

    Returns:
        (N, h, w), 0 in the padding, and (N, C), each with mean 1 per image.
    """
    valid = valid.float()
    strength = teacher.float().abs().mul_(valid[:, None])
    channel = strength.sum((2, 3)) / valid.sum((1, 2)).clamp(min=1)[:, None]
    position = power_weights(strength.mean(1), spatial_power, valid)
    return position, power_weights(channel, channel_power, torch.ones_like(channel))


def _clipped_product(position: Tensor, channel: Tensor, max_weight: float) -> Tensor:
    return (position[:, None] * channel[..., None, None]).clamp_(max=max_weight)


def _with_mean_one(weights: Tensor, valid: Tensor) -> Tensor:
    count = weights.shape[1] * valid.sum((1, 2))
    mean = weights.sum((1, 2, 3)) / count.clamp(min=1)
    return weights / mean.clamp(min=TINY)[:, None, None, None]


def element_weights(
    teacher: Tensor, valid: Tensor, spatial_power: float, channel_power: float, max_weight: float
) -> Tensor:
    """The micro weights of every element, spec 2.3. The loss itself never keeps them: see
    :func:`weighted_distance`.

    Args:
        teacher: (N, C, h, w).
        valid: (N, h, w), where the images are.
        spatial_power, channel_power: β_s and β_c.
        max_weight: highest product of position and channel weight, before the mean becomes 1.

    Returns:
        (N, C, h, w), with mean 1 per image over valid elements; 0 elsewhere; no gradient.
    """
    position, channel = micro_weights(teacher, valid, spatial_power, channel_power)
    return _with_mean_one(_clipped_product(position, channel, max_weight), valid)


def stage_weights(gaps: Tensor, power: float, low: float = 0.25, high: float = 4.0) -> Tensor:
    """The macro weights, spec 2.4.

    Args:
        gaps: (K,), how far the student is from the teacher at each stage, at least 0.
        power: η; 1 = stages that lag get more, 0 = uniform, -1 = all contribute equally.
        low, high: bounds, before the mean becomes 1.

    Returns:
        (K,), with mean 1; no gradient.
    """
    gaps = gaps.detach().float()[None]
    gaps = torch.maximum(gaps, 1e-6 * gaps.mean())  # a negative power of 0 is infinite
    weights = power_weights(gaps, power, torch.ones_like(gaps))[0].clamp(low, high)
    return weights / weights.mean()


def weighted_distance(
    student: Tensor,
    teacher: Tensor,
    position: Tensor,
    channel: Tensor,
    scale: Tensor,
    distance: str = "l2",
    max_weight: float = 10.0,
) -> Tensor:
    """The hands-on imitation loss of one stage, per image and channel, before its scale.

    Args:
        student, teacher: (N, C, h, w), the student after adapter and resizing.
        position: (N, h, w), at least 0, and 0 in the padding.
        channel: (N, C), at least 0.
        scale: (1,) or (C,), squared scale of the teacher in this batch; only "smooth_l1" reads it,
            which is linear beyond its root.
        distance: one of :data:`DISTANCES`.
        max_weight: as in :func:`element_weights`.

    Returns:
        (N, C), whose mean over C is the mean of W · D over valid elements.
    """
    # With a mean weight of 1, mean(W D) is sum(W D) / sum(W) for any multiple of W.
    weights = _clipped_product(position, channel, max_weight)
    knee = scale.sqrt()[:, None, None]
    gap = DISTANCES[distance].between(student.float(), teacher.float(), knee)
    total = weights.sum((1, 2, 3)).clamp(min=TINY)[:, None]
    # In place, but for the distances of positions: one full map less at the peak
    weighted = gap.mul_(weights) if gap.shape == weights.shape else gap * weights
    return weighted.sum((2, 3)) * channel.shape[1] / total


@DISTILLER_REGISTRY.register()
class HGD(Distiller):
    """HGD-style imitation of all stages, our reading of the abstract. With every power 0 and no
    norm, FitNets on all stages."""

    requires = {"feature": Needs(student=("stages",), teacher=("stages",))}

    @configurable
    def __init__(
        self,
        *,
        pairs: Sequence[StagePair],
        terms: Sequence[str] = ("feature",),
        before_relu: bool = False,
        learned_shares: bool = False,
        norm: str = "energy",
        distance: str = "l2",
        spatial_power: float = 1.0,
        channel_power: float = 1.0,
        gap_power: float = 0.0,
        foreground: float = 0.0,
        max_weight: float = 10.0,
        macro: str = "gap",
        macro_power: float = 1.0,
    ):
        """
        Args:
            pairs: the stages that correspond, finest first.
            terms: "feature".
            before_relu: read backbone stages before their last ReLU.
            learned_shares: several teacher stages in a pair are mixed with learned shares, at the
                student's size; otherwise they are averaged, at the size of the first.
            norm: one of :data:`NORMS`.
            distance: one of :data:`DISTANCES`.
            spatial_power, channel_power, gap_power: β_s, β_c and γ of the micro weights.
            foreground: κ, what a ground-truth box adds to the weight 1.
            max_weight: as in :func:`element_weights`.
            macro: "gap", "per_image" or "uncertainty".
            macro_power: η; "uncertainty" does not read it.
        """
        super().__init__(terms, num_levels=len(pairs))
        self.pairs = list(pairs)
        self.before_relu = before_relu
        ours = {self._need(p.part, p.student) for p in pairs}
        theirs = {self._need(p.part, stage) for p in pairs for stage in p.teachers}
        self.requires = {"feature": Needs(tuple(sorted(ours)), tuple(sorted(theirs)))}
        self.norm = norm
        self.distance = distance
        self.powers = (spatial_power, channel_power)
        self.gap_power = gap_power
        self.foreground = foreground
        self.max_weight = max_weight
        self.macro = macro
        self.macro_power = macro_power
        widths = [pair.teachers[0].channels for pair in pairs]
        self.adapters = identity_adapters(zip([p.student.channels for p in pairs], widths))
        self.mixing = nn.ParameterList(
            nn.Parameter(torch.zeros(len(pair.teachers))) for pair in pairs if learned_shares
        )
        if macro == "uncertainty":
            self.log_variances = nn.Parameter(torch.zeros(len(pairs)))
        # Running statistics, the same on all processes; NaN = no value yet
        self.scale_sizes = widths if norm == "channel_std" else [1] * len(pairs)
        self.register_buffer("scales", torch.full((sum(self.scale_sizes),), float("nan")))
        self.register_buffer("gaps", torch.full((len(pairs),), float("nan")))

    @classmethod
    def default_config(cls) -> CfgNode:
        return hgd_config()

    @classmethod
    def from_config(cls, cfg: CfgNode, student, teacher) -> Dict:
        node = cls.node(cfg)
        check_config(node)
        parts = SOURCES[node.SOURCE]
        pairs, frozen = trained_stage_pairs(
            student, teacher, parts, node.STAGES, node.PAIRING, KEY, node.UNPAIRED
        )
        before_relu = node.TAP == "pre_relu"
        if before_relu:
            check_before_relu(pairs, student, teacher)
        if frozen:
            logger.warning(
                f"{KEY}.STAGES: {', '.join(frozen)} of the student cannot learn "
                f"(MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}), left out"
            )
        return {
            "pairs": pairs,
            "terms": cls.enabled_terms(cfg),
            "before_relu": before_relu,
            "learned_shares": node.PAIRING == "learned",
            "norm": node.NORM,
            "distance": node.DISTANCE,
            "spatial_power": node.BETA_S,
            "channel_power": node.BETA_C,
            "gap_power": node.GAP_GAMMA,
            "foreground": node.FG_KAPPA,
            "max_weight": node.W_MAX,
            "macro": node.MACRO,
            "macro_power": node.ETA,
        }

    def forward(self, student, teacher, targets) -> Dict[str, Tensor]:
        sizes = student.images.image_sizes
        distances, scales, micro = [], [], []
        for k in range(len(self.pairs)):
            adapted, target, stride = self.correspond(k, student, teacher)
            valid = valid_cells(sizes, target.shape[-2:], stride, target.device)
            scales.append(squared_scale(target, valid, self.norm))
            position, channel = self.micro(adapted, target, valid, stride, scales[-1], targets)
            micro.append((position, channel, valid, stride))
            # The backward pass makes weights and errors again: no full map is kept for it
            per_channel = checkpoint(
                weighted_distance,
                adapted,
                target,
                position,
                channel,
                scales[-1],
                self.distance,
                self.max_weight,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            grouped = self.norm != "channel_std"
            distances.append(per_channel.mean(1, keepdim=True) if grouped else per_channel)
        losses = self.normalize(distances, scales)
        log_sometimes(lambda: self.numbers(losses, micro, targets))
        return {"feature": self.balance(losses)}

    def _need(self, part: str, stage: Level) -> str:
        return f"stages.{stage.name}.pre" if self.before_relu and part == "stages" else part

    def _read(self, view, part: str, stage: Level) -> Tensor:
        if self.before_relu and part == "stages":
            return view.stage_before_relu(stage.name)
        return getattr(view, part)[stage.name]

    def correspond(self, k: int, student, teacher) -> Tuple[Tensor, Tensor, int]:
        """The adapted student and its target at stage k, (N, C, h, w) each, and their stride."""
        part, ours, theirs = self.pairs[k]
        adapted = self.adapters[k](self._read(student, part, ours))
        targets = [self._read(teacher, part, stage) for stage in theirs]
        if len(self.mixing):
            shares = self.mixing[k].softmax(dim=0)
            resized = [resize(x.float(), adapted.shape[-2:]) for x in targets]
            return adapted, sum(w * x for w, x in zip(shares, resized)), ours.stride
        if len(targets) > 1:
            resized = [resize(x.float(), targets[0].shape[-2:]) for x in targets]
            targets = [torch.stack(resized).mean(0)]
        (target,), (h, w) = targets, adapted.shape[-2:]
        if target.shape[-2] >= h and target.shape[-1] >= w:
            return adapted, resize(target, (h, w)), ours.stride
        return resize(adapted, target.shape[-2:]), target, theirs[0].stride

    @torch.no_grad()
    def micro(
        self, adapted: Tensor, target: Tensor, valid: Tensor, stride: int, scale: Tensor, targets
    ) -> Tuple[Tensor, Tensor]:
        """The factors (N, h, w) and (N, C) of the micro weights, 0 in the padding."""
        position, channel = micro_weights(target, valid, *self.powers)
        if self.gap_power:
            distance, square = DISTANCES[self.distance], scale[:, None, None]
            gap = distance.between(adapted.float(), target.float(), square.sqrt())
            gap = (gap / distance.divisor(square)).mean(1)
            position = position * power_weights(gap, self.gap_power, valid.float())
        if self.foreground:
            inside = _inside_objects(targets, target.shape[-2:], stride)
            position = position * (1 + self.foreground * inside)
        return position, channel

    def normalize(self, distances: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
        """Divides by the running scales and updates all running statistics, in one reduction.

        Args:
            distances: per stage, (N, 1) or (N, C).
            scales: per stage, (1,) or (C,), of this batch.

        Returns:
            (N, K).
        """
        means = [d.detach().mean(0) for d in distances]
        scales, means = mean_over_gpus(torch.cat([*scales, *means])).chunk(2)
        squares = _follow(self.scales, scales)
        divisors = DISTANCES[self.distance].divisor(squares).split(self.scale_sizes)
        gaps = [m.div(d).mean() for m, d in zip(means.split(self.scale_sizes), divisors)]
        _follow(self.gaps, torch.stack(gaps))
        return torch.stack([(x / d).mean(1) for x, d in zip(distances, divisors)], dim=1)

    def balance(self, losses: Tensor) -> Tensor:
        """(N, K) -> (K,), each stage's share of the loss."""
        per_stage = (losses * self.macro_weights(losses)).mean(0)
        if self.macro == "uncertainty":
            per_stage = per_stage + self.log_variances
        return per_stage / len(self.pairs)

    def macro_weights(self, losses: Tensor) -> Tensor:
        """(N, K) -> (1, K) weights of stages, or (N, 1) of images."""
        if self.macro == "gap":
            return stage_weights(self.gaps, self.macro_power)[None]
        if self.macro == "per_image":
            return stage_weights(losses.mean(1), self.macro_power)[:, None]
        return (-self.log_variances).exp()[None]

    @torch.no_grad()
    def numbers(self, losses: Tensor, micro: Sequence[Tuple], targets) -> Dict[str, Tensor]:
        """What is logged of each stage: its loss, before and relative to the macro weights, the
        highest micro weight, and the share of the micro weights that is on objects."""
        plain = losses.mean(0)
        macro = (losses * self.macro_weights(losses)).mean(0) / plain.clamp(min=TINY)
        numbers = {}
        for k, (position, channel, valid, stride) in enumerate(micro):
            product = _clipped_product(position, channel, self.max_weight)
            weights = _with_mean_one(product, valid)
            inside = _inside_objects(targets, weights.shape[-2:], stride)
            values = {
                "loss": plain[k],
                "macro": macro[k],
                "max_micro": weights.amax(),
                "on_objects": (weights.sum(1) * inside).sum() / weights.sum().clamp(min=TINY),
            }
            stage = f"hgd_feature/{self.pairs[k].student.name}"
            numbers.update({f"{stage}/{name}": value for name, value in values.items()})
        return numbers


def _inside_objects(targets, size: Sequence[int], stride: int) -> Tensor:
    """(N, h, w) bool, cells that ground-truth boxes cover."""
    boxes = [t.gt_boxes.tensor for t in targets]
    return object_masks(boxes, [tuple(size)], [stride], "all_levels")[0]


@torch.no_grad()
def _follow(average: Tensor, value: Tensor) -> Tensor:
    """Updates a running average in place; the first value is taken as it is. Returns a copy."""
    average.copy_(torch.where(average.isnan(), value, average.lerp(value, 1 - MOMENTUM)))
    return average.clone()

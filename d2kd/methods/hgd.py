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

from d2kd.errors import UserError, nearest
from d2kd.methods.adapters import identity_adapters
from d2kd.methods.defeat import object_masks
from d2kd.methods.distances import DISTANCES, NORMS, squared_scale
from d2kd.methods.distiller import DISTILLER_REGISTRY, Distiller, Needs
from d2kd.methods.grids import resize, valid_cells
from d2kd.methods.schedule import term_config
from d2kd.modeling.families import StagePair, trained_stage_pairs
from d2kd.modeling.meta_arch.losses import mean_over_gpus

logger = logging.getLogger(__name__)

# Only keeps 0 / 0 away: far below any activation, far above float32's smallest number.
TINY = 1e-30
# Of the running statistics
MOMENTUM = 0.99

# What the views call the maps
SOURCES = {"backbone": ("stages",), "neck": ("features",), "both": ("stages", "features")}
PAIRINGS = ("stride", "order", "learned")
MACROS = ("gap", "per_image", "uncertainty")
RANGES = {
    "BETA_S": (0, 4),
    "BETA_C": (0, 4),
    "GAP_GAMMA": (0, 4),
    "FG_KAPPA": (0, 1000),
    "W_MAX": (1, 1000000),
    "ETA": (-2, 2),
}


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
    weights = _clipped_product(position, channel, max_weight)
    count = channel.shape[1] * valid.sum((1, 2))
    mean = weights.sum((1, 2, 3)) / count.clamp(min=1)
    return weights / mean.clamp(min=TINY)[:, None, None, None]


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
    return (weights * gap).sum((2, 3)) * channel.shape[1] / total


def _check_config(node: CfgNode) -> None:
    key = "DISTILL.HGD"
    choices = {"SOURCE": SOURCES, "PAIRING": PAIRINGS, "NORM": NORMS, "DISTANCE": DISTANCES}
    for name, known in {**choices, "MACRO": MACROS}.items():
        if node[name] not in known:
            raise UserError(f"{key}.{name} is '{node[name]}': {nearest(node[name], known)}")
    wrong = [
        f"{key}.{name} is {node[name]}: give {low} to {high}"
        for name, (low, high) in RANGES.items()
        if not low <= node[name] <= high
    ]
    if wrong:
        raise UserError("; ".join(wrong))


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
            pairs: the stages that correspond, finest first. Several teacher stages in a pair are
                mixed with learned shares.
            terms: "feature".
            norm: one of :data:`NORMS`.
            distance: one of :data:`DISTANCES`.
            spatial_power, channel_power, gap_power: β_s, β_c and γ of the micro weights.
            foreground: κ, what a ground-truth box adds to the weight 1.
            max_weight: as in :func:`element_weights`.
            macro: one of :data:`MACROS`.
            macro_power: η; "uncertainty" does not read it.
        """
        super().__init__(terms, num_levels=len(pairs))
        self.pairs = list(pairs)
        parts = tuple(sorted({pair.part for pair in pairs}))
        self.requires = {"feature": Needs(student=parts, teacher=parts)}
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
        mixed = any(len(pair.teachers) > 1 for pair in pairs)
        self.mixing = nn.ParameterList(
            nn.Parameter(torch.zeros(len(pair.teachers))) for pair in pairs if mixed
        )
        if macro == "uncertainty":
            self.log_variances = nn.Parameter(torch.zeros(len(pairs)))
        # Running statistics, the same on all processes; NaN = no value yet
        self.scale_sizes = widths if norm == "channel_std" else [1] * len(pairs)
        self.register_buffer("scales", torch.full((sum(self.scale_sizes),), float("nan")))
        self.register_buffer("gaps", torch.full((len(pairs),), float("nan")))

    @classmethod
    def default_config(cls) -> CfgNode:
        node = CfgNode()
        # λ (our reading). LEVEL_WEIGHTS: one factor per stage, the "manual" macro weights
        node.FEATURE = term_config(weight=1.0, warmup_iters=1000)
        # backbone (stages), neck (FPN levels) or both (our reading)
        node.SOURCE = "backbone"
        # The student's stages or levels, by name; empty = all that are trained (our reading)
        node.STAGES = []
        # stride; order (from the coarsest); learned: a mix of all teacher stages, which must
        # be of one width (our reading)
        node.PAIRING = "stride"
        # Errors are divided by the running root mean square of the teacher's stage (energy), by
        # the standard deviation of each of its channels (channel_std), or not (our reading)
        node.NORM = "energy"
        # l2, l1, smooth_l1, cosine (of positions; NORM has no effect), or partial_l2: no error
        # where student <= teacher <= 0, for maps with negative values (our reading)
        node.DISTANCE = "l2"
        # Micro weights: powers of the teacher's activation per position and per channel, and of
        # the error per position; 0 = off (our reading)
        node.BETA_S = 1.0
        node.BETA_C = 1.0
        node.GAP_GAMMA = 0.0
        # Positions in ground-truth boxes weigh 1 + FG_KAPPA times as much (our reading)
        node.FG_KAPPA = 0.0
        # Highest product of the micro weights, before their mean becomes 1 (our reading)
        node.W_MAX = 10.0
        # Macro weights: gap (of stages, by their running loss), per_image (of images, by their
        # loss), or uncertainty (learned, of stages) (our reading)
        node.MACRO = "gap"
        # Power of the gap: 1 = more for those that lag, 0 = uniform, -1 = equal shares of the loss
        # (our reading)
        node.ETA = 1.0
        return node

    @classmethod
    def from_config(cls, cfg: CfgNode, student, teacher) -> Dict:
        node = cls.node(cfg)
        _check_config(node)
        pairs, frozen = trained_stage_pairs(
            student, teacher, SOURCES[node.SOURCE], node.STAGES, node.PAIRING, "DISTILL.HGD"
        )
        if frozen:
            logger.warning(
                f"DISTILL.HGD.STAGES: {', '.join(frozen)} of the student cannot learn "
                f"(MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}), left out"
            )
        return {
            "pairs": pairs,
            "terms": cls.enabled_terms(cfg),
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
        distances, scales = [], []
        for k in range(len(self.pairs)):
            adapted, target, stride = self.correspond(k, student, teacher)
            valid = valid_cells(sizes, target.shape[-2:], stride, target.device)
            scales.append(squared_scale(target, valid, self.norm))
            position, channel = self.micro(adapted, target, valid, stride, scales[-1], targets)
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
        return {"feature": self.balance(self.normalize(distances, scales))}

    def correspond(self, k: int, student, teacher) -> Tuple[Tensor, Tensor, int]:
        """The adapted student and its target at stage k, (N, C, h, w) each, and their stride."""
        part, ours, theirs = self.pairs[k]
        adapted = self.adapters[k](getattr(student, part)[ours.name])
        targets = [getattr(teacher, part)[stage.name] for stage in theirs]
        if len(self.mixing):
            shares = self.mixing[k].softmax(dim=0)
            resized = [resize(x.float(), adapted.shape[-2:]) for x in targets]
            return adapted, sum(w * x for w, x in zip(shares, resized)), ours.stride
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
            boxes = [t.gt_boxes.tensor for t in targets]
            (inside,) = object_masks(boxes, [target.shape[-2:]], [stride], "all_levels")
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
        """Macro weights: (N, K) -> (K,), each stage's share of the loss."""
        per_stage = losses.mean(0)
        if self.macro == "gap":
            per_stage = per_stage * stage_weights(self.gaps, self.macro_power)
        elif self.macro == "per_image":
            weights = stage_weights(losses.mean(1), self.macro_power)
            per_stage = (losses * weights[:, None]).mean(0)
        else:
            per_stage = per_stage * (-self.log_variances).exp() + self.log_variances
        return per_stage / len(self.pairs)


@torch.no_grad()
def _follow(average: Tensor, value: Tensor) -> Tensor:
    """Updates a running average in place; the first value is taken as it is. Returns a copy."""
    average.copy_(torch.where(average.isnan(), value, average.lerp(value, 1 - MOMENTUM)))
    return average.clone()

"""HGD (our reading of the abstract): Hands-on Guidance for Distilling Object Detectors (Qin et al.,
ICME 2021, https://arxiv.org/abs/2103.14337).

Only the abstract of the paper is public to us: it names imitation of all stage features, a
correspondence between networks, a "hands-on" imitation loss, and weights at a micro and a macro
level. Every formula and default below is our reading of these words, so no number that comes of it
is a reproduction.

Shapes: N images, C channels of the teacher, (h, w) the size of a stage, K stages.
"""

import logging
from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2kd.layers import as_float, as_target, mean_over_gpus, object_masks, valid_cells
from d2kd.methods.core import DISTILLER_REGISTRY, Distiller, Terms, identity_adapters, term
from d2kd.schema import Key
from d2kd.views import (
    Family,
    Features,
    Level,
    Read,
    Reads,
    Stage,
    StudentView,
    TeacherView,
    View,
)

from .distances import DISTANCES, NORMS, squared_scale
from .pairs import StagePair, resize, trained_stage_pairs
from .weights import (
    TINY,
    Compared,
    micro_weights,
    power_weights,
    stage_weights,
    weighted_distance,
)

logger = logging.getLogger(__name__)

# Of the running statistics
MOMENTUM = 0.99
# What the maps are: stages of the backbone, FPN levels
SOURCES = {"backbone": ("stages",), "neck": ("features",), "both": ("stages", "features")}


@DISTILLER_REGISTRY.register()
class HGD(Distiller):
    """HGD-style imitation of all stages, our reading of the abstract. With every power 0 and no
    norm, FitNets on all stages."""

    caveat = "our reading of the paper's abstract; what comes of it is no reproduction"

    keys = {
        "FEATURE": term(
            1.0,
            'Weight of the loss (λ). LEVEL_WEIGHTS: a factor per stage, the "manual" macro weights',
            warmup_iters=1000,
        ),
        "SOURCE": Key(
            "backbone", "Compare backbone stages, neck (FPN levels) or both", choices=tuple(SOURCES)
        ),
        "STAGES": Key([], "The student's stages or levels; empty = all that are trained", item=str),
        "PRE_ACTIVATION": Key(
            False,
            "Compare stages before the ReLU that ends them (Detectron2's ResNets alone). FPN "
            "levels have none",
        ),
        "PAIRING": Key(
            "stride",
            "How stages are paired: by stride, by order (from the coarsest), or learned: with a "
            "mix of all teacher stages, which must be of one width",
            choices=("stride", "order", "learned"),
        ),
        "UNPAIRED": Key(
            "drop",
            "Teacher stages without a partner: drop them, or average them, at the partner's size, "
            "into the pair of nearest stride, all of one width",
            choices=("drop", "average"),
        ),
        "NORM": Key(
            "energy",
            "Errors are divided by the running root mean square of the teacher's stage (energy), "
            "by the standard deviation of each of its channels (channel_std), or not (none)",
            choices=NORMS,
        ),
        "DISTANCE": Key(
            "l2",
            "The error: l2, l1, smooth_l1, cosine (of positions; NORM has no effect), or "
            "partial_l2: none where student <= teacher <= 0, for maps with negative values",
            choices=tuple(DISTANCES),
        ),
        "SPATIAL_POWER": Key(
            1.0,
            "Micro weights: power of the teacher's activation per position; 0 = off",
            low=0,
            high=4,
        ),
        "CHANNEL_POWER": Key(
            1.0, "Micro weights: power of the activation per channel; 0 = off", low=0, high=4
        ),
        "GAP_POWER": Key(0.0, "Micro weights: power of the local error; 0 = off", low=0, high=4),
        "FOREGROUND": Key(
            0.0, "Micro weights: what a ground-truth box adds to the weight 1", low=0, high=1000
        ),
        "MAX_WEIGHT": Key(
            10.0,
            "Highest product of the micro weights, before they are scaled to a mean of 1",
            low=1,
            high=1000000,
        ),
        "MACRO": Key(
            "gap",
            "Macro weights, between stages or images: gap (of stages, by their running loss), "
            "per_image (of images, by their loss), or uncertainty (learned, of stages)",
            choices=("gap", "per_image", "uncertainty"),
        ),
        "MACRO_POWER": Key(
            1.0,
            "Power of the gap in the macro weights: 1 = more for those that lag, 0 = uniform, "
            "-1 = equal shares of the loss",
            low=-2,
            high=2,
        ),
    }

    @configurable
    def __init__(
        self,
        *,
        pairs: Sequence[StagePair],
        terms: Sequence[str],
        pre_activation: bool,
        learned_shares: bool,
        norm: str,
        distance: str,
        spatial_power: float,
        channel_power: float,
        gap_power: float,
        foreground: float,
        max_weight: float,
        macro: str,
        macro_power: float,
    ):
        """
        Args:
            pairs: the stages that correspond, finest first.
            terms: "feature".
            pre_activation: read backbone stages before their last activation.
            learned_shares: several teacher stages in a pair are mixed with learned shares, at the
                student's size; otherwise they are averaged, at the size of the first.
            norm: one of :data:`NORMS`.
            distance: one of :data:`DISTANCES`.
            spatial_power, channel_power, gap_power: of the micro weights.
            foreground: what a ground-truth box adds to the weight 1.
            max_weight: as in :func:`element_weights`.
            macro: "gap", "per_image" or "uncertainty".
            macro_power: "uncertainty" does not read it.
        """
        super().__init__(terms, num_levels=len(pairs))
        self.pairs = list(pairs)
        self.pre_activation = pre_activation
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
    def reads(cls, node: CfgNode, student: Family, teacher: Family) -> Dict[str, Reads]:
        pairs, _ = _pairs(node, student, teacher)
        before = node.PRE_ACTIVATION
        ours = dict.fromkeys(_read(p.part, p.student, before) for p in pairs)
        theirs = dict.fromkeys(_read(p.part, x, before) for p in pairs for x in p.teachers)
        knob = "PRE_ACTIVATION" if before else "SOURCE"
        return {"feature": Reads(tuple(ours), tuple(theirs), {Stage: knob})}

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        pairs, frozen = _pairs(cfg, student, teacher)
        if frozen:
            logger.warning(
                f"{cls.node_name()}.STAGES: {', '.join(frozen)} of the student cannot learn "
                "(MODEL.BACKBONE.FREEZE_AT), left out"
            )
        return {
            "pairs": pairs,
            "terms": cls.enabled_terms(cfg),
            "pre_activation": cfg.PRE_ACTIVATION,
            "learned_shares": cfg.PAIRING == "learned",
            "norm": cfg.NORM,
            "distance": cfg.DISTANCE,
            "spatial_power": cfg.SPATIAL_POWER,
            "channel_power": cfg.CHANNEL_POWER,
            "gap_power": cfg.GAP_POWER,
            "foreground": cfg.FOREGROUND,
            "max_weight": cfg.MAX_WEIGHT,
            "macro": cfg.MACRO,
            "macro_power": cfg.MACRO_POWER,
        }

    def forward(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Terms:
        stages, distances = [], []
        for k in range(len(self.pairs)):
            stages.append(self.compared(k, student, teacher, targets))
            distances.append(self.distances(stages[-1]))
        losses = self.normalize(distances, [stage.scale for stage in stages])
        diagnostics = {"feature": lambda: self.diagnostics(losses, stages, targets)}
        return Terms({"feature": self.balance(losses)}, diagnostics)

    @torch.no_grad()
    def maps(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Dict[str, Tensor]]:
        found = {}
        for k, (part, ours, _) in enumerate(self.pairs):
            weights = self.compared(k, student, teacher, targets).weights(self.max_weight)
            weights = resize(weights, self._map(student, part, ours).shape[-2:]).mean(1)
            found[ours.name] = weights / weights.amax().clamp(min=TINY)
        return {"micro weights, mean of the channels": found}

    def compared(
        self, k: int, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Compared:
        """What is compared at stage k."""
        adapted, target, stride = self.correspond(k, student, teacher)
        sizes = student.images.image_sizes
        valid = valid_cells(sizes, target.shape[-2:], stride, target.device)
        scale = squared_scale(target, valid, self.norm)
        position, channel = self.micro(adapted, target, valid, stride, scale, targets)
        return Compared(adapted, target, stride, valid, scale, position, channel)

    def distances(self, stage: Compared) -> Tensor:
        """Weighted distances of a stage, before they are normalized: (N, C) where every channel
        has a scale of its own, else (N, 1)."""
        # The backward pass makes weights and errors again: no full map is kept for it
        per_channel = checkpoint(
            weighted_distance,
            stage.adapted,
            stage.target,
            stage.position,
            stage.channel,
            stage.scale,
            self.distance,
            self.max_weight,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return per_channel if self.norm == "channel_std" else per_channel.mean(1, keepdim=True)

    def _map(self, view: View, part: str, level: Level) -> Tensor:
        if part == "stages":
            return view.stage(Stage(level.name, self.pre_activation))
        return view.features[level.name]

    def correspond(
        self, k: int, student: StudentView, teacher: TeacherView
    ) -> Tuple[Tensor, Tensor, int]:
        """The adapted student and its target at stage k, (N, C, h, w) each, and their stride."""
        part, ours, theirs = self.pairs[k]
        adapted = self.adapters[k](self._map(student, part, ours))
        targets = [self._map(teacher, part, stage) for stage in theirs]
        if len(self.mixing):
            shares = self.mixing[k].softmax(dim=0)
            resized = [resize(as_float(x), adapted.shape[-2:]) for x in targets]
            return adapted, sum(w * x for w, x in zip(shares, resized)), ours.stride
        if len(targets) > 1:
            resized = [resize(as_float(x), targets[0].shape[-2:]) for x in targets]
            targets = [torch.stack(resized).mean(0)]
        (target,), (h, w) = targets, adapted.shape[-2:]
        if target.shape[-2] >= h and target.shape[-1] >= w:
            return adapted, as_target(resize(target, (h, w)), adapted), ours.stride
        adapted = resize(adapted, target.shape[-2:])
        return adapted, as_target(target, adapted), theirs[0].stride

    @torch.no_grad()
    def micro(
        self,
        adapted: Tensor,
        target: Tensor,
        valid: Tensor,
        stride: int,
        scale: Tensor,
        targets: Sequence[Instances],
    ) -> Tuple[Tensor, Tensor]:
        """The factors (N, h, w) and (N, C) of the micro weights, 0 in the padding."""
        position, channel = micro_weights(target, valid, *self.powers)
        if self.gap_power:
            distance, square = DISTANCES[self.distance], scale[:, None, None]
            gap = distance.between(as_float(adapted), as_float(target), square.sqrt())
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
    def diagnostics(
        self, losses: Tensor, stages: Sequence[Compared], targets: List[Instances]
    ) -> Dict[str, Tensor]:
        """What is logged of each stage: its loss, before and relative to the macro weights, the
        highest micro weight, and the share of the micro weights that is on objects."""
        plain = losses.mean(0)
        macro = (losses * self.macro_weights(losses)).mean(0) / plain.clamp(min=TINY)
        diagnostics = {}
        for k, stage in enumerate(stages):
            weights = stage.weights(self.max_weight)
            inside = _inside_objects(targets, weights.shape[-2:], stage.stride)
            values = {
                "loss": plain[k],
                "macro": macro[k],
                "max_micro": weights.amax(),
                "on_objects": (weights.sum(1) * inside).sum() / weights.sum().clamp(min=TINY),
            }
            name = self.pairs[k].student.name
            diagnostics.update({f"{name}/{what}": value for what, value in values.items()})
        return diagnostics


def _pairs(node: CfgNode, student: Family, teacher: Family) -> Tuple[List[StagePair], List[str]]:
    parts, key = SOURCES[node.SOURCE], HGD.node_name()
    return trained_stage_pairs(
        student, teacher, parts, node.STAGES, node.PAIRING, key, node.UNPAIRED
    )


def _read(part: str, level: Level, pre_activation: bool) -> Read:
    return Stage(level.name, pre_activation) if part == "stages" else Features()


def _inside_objects(targets: Sequence[Instances], size: Sequence[int], stride: int) -> Tensor:
    """(N, h, w) bool, cells that ground-truth boxes cover."""
    boxes = [t.gt_boxes.tensor for t in targets]
    return object_masks(boxes, [tuple(size)], [stride], "all_levels")[0]


@torch.no_grad()
def _follow(average: Tensor, value: Tensor) -> Tensor:
    """Updates a running average in place; the first value is taken as it is. Returns a copy."""
    average.copy_(torch.where(average.isnan(), value, average.lerp(value, 1 - MOMENTUM)))
    return average.clone()

"""DeFeat: Distilling Object Detectors via Decoupled Features (Guo et al., CVPR 2021,
https://arxiv.org/abs/2103.14475).

Imitation of FPN levels, and optionally of backbone stages and RoI classes, with objects and
background as two terms: each has its own weight and is a mean over its own region. Formulas and
masks follow the authors' released code; the paper's text could not be compared.

Formulas with their sources: docs/methods/defeat.md.

Shapes: N images, C channels, (h, w) the size of a level, L levels, R RoIs,
K classes.
"""

from typing import Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.errors import UserError
from d2kd.layers import as_float, as_target, kl_divergence, object_masks
from d2kd.layers.masks import ASSIGNMENTS
from d2kd.methods.core import DISTILLER_REGISTRY, Distiller, conv_adapters, term
from d2kd.schema import Key
from d2kd.views import (
    Family,
    Features,
    Level,
    LevelPair,
    Proposals,
    Reads,
    Regions,
    Stage,
    StudentView,
    TeacherView,
    channels_of,
    paired_levels,
    paired_stages,
)

__all__ = ["DeFeat", "decoupled_classification", "decoupled_imitation", "object_masks"]

# Whose sampled proposals the heads are compared on
PROPOSALS_FROM = ("teacher", "student", "both")
_ASSIGN_HELP = (
    "Where a box is an object: official: on the one level of its size; all_levels: on each; "
    "everywhere: no decoupling, the object term takes the whole map (half the plain mean squared "
    "error) and the weight of the background term must be 0"
)


def decoupled_imitation(adapted: Tensor, teacher: Tensor, mask: Tensor) -> Tuple[Tensor, Tensor]:
    """Half the mean squared feature difference, over objects and over background: one level of
    both terms before λ and 1/L.

    Args:
        adapted: (N, C, h, w), student features after the adapter.
        teacher: (N, C, h, w), teacher features.
        mask: (N, h, w), true on objects.

    Returns:
        (object, background) scalars: Σ M (φ(s) − t)² / max(1, 2 C Σ M), likewise with 1 − M. The
        sums go over the whole batch, padding included.
    """
    difference = F.mse_loss(as_float(adapted), as_target(teacher, adapted), reduction="none").sum(
        dim=1
    )
    on, off = mask.float(), 1 - mask.float()
    halves = 2 * teacher.shape[1]
    return (
        (difference * on).sum() / (halves * on.sum()).clamp(min=1),
        (difference * off).sum() / (halves * off.sum()).clamp(min=1),
    )


def _shares_of_mean(
    adapted: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]
) -> Tuple[Tensor, Tensor]:
    """Both terms per map, (L,) each, divided by L."""
    objects, backgrounds = zip(*map(decoupled_imitation, adapted, teacher, masks))
    return torch.stack(objects) / len(masks), torch.stack(backgrounds) / len(masks)


def decoupled_classification(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    num_classes: int,
    object_temperature: float,
    background_temperature: float,
) -> Tuple[Tensor, Tensor]:
    """KL divergence of the class distributions, over positive and over negative RoIs: both terms
    before β.

    Args:
        student_logits, teacher_logits: (R, K + 1), background last.
        labels: (R,), the class of each RoI; K = negative.
        num_classes: K.
        object_temperature, background_temperature: T of each softmax, > 0.

    Returns:
        (object, background) scalars: T² Σ KL(softmax(z_t / T) ‖ softmax(z_s / T)) / number of
        RoIs; 0 without any.
    """
    positive = (labels >= 0) & (labels < num_classes)
    temperatures = (object_temperature, background_temperature)
    return tuple(
        (kl_divergence(student_logits, teacher_logits, t, dim=1) * chosen).sum()
        / chosen.sum().clamp(min=1)
        for chosen, t in zip((positive, labels == num_classes), temperatures)
    )


def near_zero_adapters(channels: Sequence[Tuple[int, int]]) -> nn.ModuleList:
    """3×3 convolutions whose weights start below 2e-4, as in the released code: they let almost no
    gradient through at first, which works as a warm-up.

    Args:
        channels: (student channels, teacher channels) per level.
    """
    adapters = conv_adapters(channels)
    with torch.no_grad():
        for conv in adapters:
            conv.weight.normal_().fmod_(2).mul_(1e-4)
    return adapters


def _terms_of(part: str) -> Tuple[str, str]:
    """The object and the background term of a part: neck, stage or head."""
    return f"{part}_object", f"{part}_background"


def _stages(node: CfgNode, student: Family, teacher: Family) -> List[LevelPair]:
    key = f"{DeFeat.node_name()}.STAGES"
    if not node.STAGES:
        raise UserError(f"{key} is []: name at least one stage")
    return paired_stages(student, teacher, node.STAGES, key)


def _boxes(targets: Sequence[Instances]) -> List[Tensor]:
    return [t.gt_boxes.tensor for t in targets]


def _stage_reads(pairs: Sequence[LevelPair]) -> Reads:
    ours, theirs = zip(*pairs)
    return Reads(
        student=(Features(), *(Stage(x.name) for x in ours)),
        teacher=tuple(Stage(x.name) for x in theirs),
        knobs={Stage: "STAGES"},
    )


def _head_reads(node: CfgNode) -> Reads:
    proposals = (Proposals(node.CASCADE_STAGE),)
    predictions = (Regions(predictions=True, stage=node.CASCADE_STAGE),)
    from_student = node.PROPOSALS_FROM in ("student", "both")
    from_teacher = node.PROPOSALS_FROM in ("teacher", "both")
    return Reads(
        student=(proposals if from_student else ()) + predictions,
        teacher=(proposals if from_teacher else ()) + predictions,
        knobs=dict.fromkeys((Proposals, Regions), "CASCADE_STAGE") if node.CASCADE_STAGE else {},
    )


@DISTILLER_REGISTRY.register()
class DeFeat(Distiller):
    """Decoupled imitation of FPN levels ("neck"), backbone stages and RoI classes ("head")."""

    caveat = "its default weights are the authors' for VOC; for COCO one of them names 4, 16"

    keys = {
        "NECK_OBJECT": term(
            3.0,
            "Weight of the loss on objects of FPN levels; the authors' value for VOC, 4 on COCO",
        ),
        "NECK_BACKGROUND": term(
            12.0,
            "Weight of the loss on the background of FPN levels; the authors' value for VOC, 16 on "
            "COCO",
        ),
        "STAGE_OBJECT": term(
            0.0, "Weight of the loss on objects of backbone stages, a mean over STAGES"
        ),
        "STAGE_BACKGROUND": term(
            0.0, "Weight of the loss on the background of backbone stages, a mean over STAGES"
        ),
        "HEAD_OBJECT": term(
            0.0,
            "Weight of the class loss on positive proposals, two-stage only; the authors' config "
            "names 2, but has it switched off",
        ),
        "HEAD_BACKGROUND": term(
            0.0,
            "Weight of the class loss on negative proposals, two-stage only; the authors' config "
            "names 2, but has it switched off",
        ),
        "NECK_ASSIGN": Key("official", _ASSIGN_HELP, choices=ASSIGNMENTS),
        "STAGE_ASSIGN": Key(
            "all_levels",
            "Where a box is an object: all_levels: in every stage; everywhere: as in NECK_ASSIGN",
            choices=("all_levels", "everywhere"),
        ),
        "STAGES": Key(
            ["res3", "res4", "res5"],
            "The student's backbone stages to imitate; the teacher's are those of equal stride",
        ),
        "PROPOSALS_FROM": Key(
            "teacher",
            "Whose proposals the heads are compared on: teacher (the student's box head runs once "
            "more), student, or both (the sum of the two)",
            choices=PROPOSALS_FROM,
        ),
        "OBJECT_TEMPERATURE": Key(1.0, "Temperature of the softmax in HEAD_OBJECT", above=0),
        "BACKGROUND_TEMPERATURE": Key(
            1.0, "Temperature of the softmax in HEAD_BACKGROUND", above=0
        ),
        "CASCADE_STAGE": Key(0, "Which box head of a Cascade R-CNN is compared, from 0", low=0),
    }

    @configurable
    def __init__(
        self,
        *,
        terms: Sequence[str],
        levels: Sequence[LevelPair],
        stages: Sequence[LevelPair],
        finest: Optional[Level],
        num_classes: int,
        neck_assign: str,
        stage_assign: str,
        proposals_from: str,
        temperatures: Tuple[float, float],
        cascade_stage: int,
    ):
        """
        Args:
            terms: which of the six terms to compute.
            levels: (student, teacher) FPN levels of equal stride, finest first.
            stages: (student, teacher) backbone stages of equal stride.
            finest: the student's finest FPN level, on which the stages' mask is drawn.
            num_classes: K of the box heads.
            neck_assign, stage_assign: how objects are assigned to levels, see
                :func:`~d2kd.layers.object_masks`.
            proposals_from: one of :data:`PROPOSALS_FROM`.
            temperatures: of the head's object and background term.
            cascade_stage: which box head of a cascade, from 0.
        """
        super().__init__(terms, num_levels=len(levels))
        self.levels = list(levels)
        self.stages = list(stages)
        self.finest = finest
        self.num_classes = num_classes
        self.neck_assign = neck_assign
        self.stage_assign = stage_assign
        self.proposals_from = proposals_from
        self.temperatures = temperatures
        self.proposals_read = Proposals(cascade_stage)
        self.predictions_read = Regions(predictions=True, stage=cascade_stage)
        self.neck_adapters = near_zero_adapters(channels_of(levels))
        self.stage_adapters = near_zero_adapters(channels_of(stages))

    @classmethod
    def check_config(cls, node: CfgNode) -> None:
        super().check_config(node)
        for part in ("neck", "stage"):
            key, (_, background) = f"{part.upper()}_ASSIGN", _terms_of(part)
            if node[key] == "everywhere" and background in cls.enabled_terms(node):
                raise UserError(
                    f"{cls.node_name()}.{key} is 'everywhere', which leaves no background, "
                    f"but {cls.term_key(background)} is not 0: set it to 0"
                )

    @classmethod
    def reads(cls, node: CfgNode, student: Family, teacher: Family) -> Dict[str, Reads]:
        reads_of = {
            "neck": lambda: Reads((Features(),), (Features(),)),
            "stage": lambda: _stage_reads(_stages(node, student, teacher)),
            "head": lambda: _head_reads(node),
        }
        parts = {part: cls._enabled_of(part, node) for part in reads_of}
        return {term: reads_of[part]() for part, terms in parts.items() for term in terms}

    @classmethod
    def _enabled_of(cls, part: str, node: CfgNode) -> List[str]:
        return [term for term in _terms_of(part) if term in cls.enabled_terms(node)]

    @classmethod
    def check_pair(cls, node: CfgNode, student: Family, teacher: Family) -> None:
        head = cls._enabled_of("head", node)
        if head:
            ours, theirs = student.box_head, teacher.box_head
            ours.check_same_classes(theirs, node.CASCADE_STAGE, cls.term_key(head[0]))

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        neck, stage = cls._enabled_of("neck", cfg), cls._enabled_of("stage", cfg)
        return {
            "terms": cls.enabled_terms(cfg),
            "levels": paired_levels(student, teacher, cls.term_key(neck[0])) if neck else (),
            "stages": _stages(cfg, student, teacher) if stage else (),
            "finest": student.levels[0] if student.levels else None,
            "num_classes": student.num_classes,
            "neck_assign": cfg.NECK_ASSIGN,
            "stage_assign": cfg.STAGE_ASSIGN,
            "proposals_from": cfg.PROPOSALS_FROM,
            "temperatures": (cfg.OBJECT_TEMPERATURE, cfg.BACKGROUND_TEMPERATURE),
            "cascade_stage": cfg.CASCADE_STAGE,
        }

    def levels_of(self, term: str) -> int:
        return self.num_levels if term in _terms_of("neck") else 0

    def forward(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Tensor]:
        losses = {}
        for part, compare in (("neck", self.neck), ("stage", self.stage), ("head", self.head)):
            if any(map(self.wants, _terms_of(part))):
                losses.update(zip(_terms_of(part), compare(student, teacher, targets)))
        return {name: value for name, value in losses.items() if self.wants(name)}

    def neck(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Tuple[Tensor, Tensor]:
        """Both terms of the FPN levels, (L,) each: one share of the mean per level."""
        ours = [student.features[level.name] for level, _ in self.levels]
        theirs = [teacher.features[level.name] for _, level in self.levels]
        adapted = [conv(x) for conv, x in zip(self.neck_adapters, ours)]
        return _shares_of_mean(adapted, theirs, self.masks(student, targets))

    def stage(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Tuple[Tensor, Tensor]:
        """Both terms of the backbone stages, scalars."""
        ours = [student.stage(Stage(stage.name)) for stage, _ in self.stages]
        theirs = [teacher.stage(Stage(stage.name)) for _, stage in self.stages]
        # All boxes together, drawn on the finest level and brought to the size of each stage
        size = student.features[self.finest.name].shape[-2:]
        (mask,) = object_masks(_boxes(targets), [size], [self.finest.stride], self.stage_assign)
        masks = [F.interpolate(mask[:, None].float(), x.shape[-2:])[:, 0] for x in ours]
        adapted = [conv(x).relu() for conv, x in zip(self.stage_adapters, ours)]
        objects, backgrounds = _shares_of_mean(adapted, theirs, masks)
        return objects.sum(), backgrounds.sum()

    def head(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Tuple[Tensor, Tensor]:
        """Both terms of the RoI classes, scalars, on the proposals of :attr:`proposals_from`."""
        samplers = {"student": [student], "teacher": [teacher], "both": [student, teacher]}
        losses = []
        for sampler in samplers[self.proposals_from]:
            regions = sampler.proposals(self.proposals_read)
            losses.append(
                decoupled_classification(
                    student.regions(regions, self.predictions_read).logits,
                    teacher.regions(regions, self.predictions_read).logits,
                    torch.cat(regions.classes),
                    self.num_classes,
                    *self.temperatures,
                )
            )
        return tuple(sum(values) for values in zip(*losses))

    def maps(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Dict[str, Tensor]]:
        if not self.levels:
            return {}
        pairs = zip(self.levels, self.masks(student, targets))
        return {"objects": {ours.name: mask.float() for (ours, _), mask in pairs}}

    def masks(self, student: StudentView, targets: List[Instances]) -> List[Tensor]:
        """Where objects are on each paired FPN level, (N, h, w) bool each."""
        sizes = [student.features[level.name].shape[-2:] for level, _ in self.levels]
        strides = [level.stride for level, _ in self.levels]
        return object_masks(_boxes(targets), sizes, strides, self.neck_assign)

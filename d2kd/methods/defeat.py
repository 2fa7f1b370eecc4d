"""DeFeat: Distilling Object Detectors via Decoupled Features (Guo et al., CVPR 2021,
https://arxiv.org/abs/2103.14475).

Imitation of FPN levels, and optionally of backbone stages and RoI classes, with objects and
background as two terms: each has its own weight and is a mean over its own region. Formulas and
masks follow the authors' released code; the paper's text could not be compared.

Shapes: N images, G boxes of an image, C channels, (h, w) the size of a level, L levels, R RoIs,
K classes.
"""

import math
from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from d2kd.errors import UserError, nearest
from d2kd.methods.adapters import conv_adapters
from d2kd.methods.distiller import DISTILLER_REGISTRY, Distiller, Needs
from d2kd.methods.schedule import term_config
from d2kd.modeling.families import Level, paired_levels, paired_stages

# Boxes below twice this size, in pixels, belong to the finest level, whatever its stride.
FINEST_SCALE = 56

# Where there are objects: in a box on the level of its size, in a box on every level, or everywhere
# (no decoupling: the object term is half the plain mean squared error, the background term is 0)
ASSIGNMENTS = ("official", "all_levels", "everywhere")
# Whose sampled proposals the heads are compared on
SAMPLINGS = ("teacher", "student", "both")


def object_masks(
    boxes: Sequence[Tensor],
    sizes: Sequence[Tuple[int, int]],
    strides: Sequence[int],
    assign: str = "official",
) -> List[Tensor]:
    """Marks the cells that boxes cover on the FPN levels.

    A cell is covered from the truncated corner of a box up to, without it, the cell of the
    opposite corner. A box within one row or column of cells marks only its first cell.

    Args:
        boxes: per image, (G, 4) xyxy in pixels of the padded batch.
        sizes: (h, w) per level, finest first.
        strides: pixels per cell, per level.
        assign: one of :data:`ASSIGNMENTS`.

    Returns:
        (N, h, w) bool per level.
    """
    if assign == "everywhere":
        return [boxes[0].new_ones((len(boxes), *size), dtype=torch.bool) for size in sizes]
    # NaN compares as false with everything, so the padding marks nothing.
    padded = pad_sequence([b.float() for b in boxes], batch_first=True, padding_value=math.nan)
    level_of_box = _assigned_levels(padded, len(sizes))
    masks = []
    for level, (size, stride) in enumerate(zip(sizes, strides)):
        rows, columns = _covered_cells(padded, size, stride)
        if assign == "official":
            rows = rows & (level_of_box == level)[..., None]
        masks.append(torch.einsum("ngy,ngx->nyx", rows.float(), columns.float()) > 0)
    return masks


def _assigned_levels(boxes: Tensor, num_levels: int) -> Tensor:
    """The level of each box by its size, (N, G), as floats. The sides count one pixel more."""
    width, height = (boxes[..., 2:] - boxes[..., :2] + 1).unbind(-1)
    level = torch.log2((width * height).sqrt() / FINEST_SCALE + 1e-6).floor()
    return level.clamp(0, num_levels - 1)


def _covered_cells(boxes: Tensor, size: Tuple[int, int], stride: int) -> Tuple[Tensor, Tensor]:
    """Which rows (N, G, h) and columns (N, G, w) of one level each box covers."""
    left, top, right, bottom = (boxes / stride).trunc().unbind(-1)
    h, w = size
    left, top = left.clamp(min=0), top.clamp(min=0)
    right, bottom = right.clamp(max=w), bottom.clamp(max=h)
    thin = (left == right) | (top == bottom)
    return _span(top, bottom, thin, h), _span(left, right, thin, w)


def _span(first: Tensor, end: Tensor, thin: Tensor, size: int) -> Tensor:
    first = torch.where(thin, first.clamp(max=size - 1), first)
    end = torch.where(thin, first + 1, end)
    cells = torch.arange(size, device=first.device)
    return (cells >= first[..., None]) & (cells < end[..., None])


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
    difference = F.mse_loss(adapted.float(), teacher.detach().float(), reduction="none").sum(dim=1)
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
        _mean_kl(student_logits.float() / t, teacher_logits.detach().float() / t, chosen) * t**2
        for chosen, t in zip((positive, labels == num_classes), temperatures)
    )


def _mean_kl(student_logits: Tensor, teacher_logits: Tensor, chosen: Tensor) -> Tensor:
    log_p, log_q = student_logits.log_softmax(dim=1), teacher_logits.log_softmax(dim=1)
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)
    return (kl * chosen).sum() / chosen.sum().clamp(min=1)


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


def _check_config(node: CfgNode, terms: Sequence[str]) -> None:
    key = "DISTILL.DEFEAT"
    for name, known in (("ASSIGN", ASSIGNMENTS), ("SAMPLING", SAMPLINGS)):
        if node[name] not in known:
            raise UserError(f"{key}.{name} is '{node[name]}': {nearest(node[name], known)}")
    for name in ("OBJECT_TEMPERATURE", "BACKGROUND_TEMPERATURE"):
        if node[name] <= 0:
            raise UserError(f"{key}.{name} is {node[name]}: give a number above 0")
    zero = [t.upper() for t in terms if t in ("neck_background", "stage_background")]
    if node.ASSIGN == "everywhere" and zero:
        raise UserError(
            f"{key}.ASSIGN is 'everywhere', which leaves no background, but {key}.{zero[0]}.WEIGHT "
            "is not 0: set it to 0"
        )


def _boxes(targets) -> List[Tensor]:
    return [t.gt_boxes.tensor for t in targets]


@DISTILLER_REGISTRY.register()
class DeFeat(Distiller):
    """Decoupled imitation of FPN levels ("neck"), backbone stages and RoI classes ("head")."""

    requires = {
        "neck_object": Needs(student=("features",), teacher=("features",)),
        "neck_background": Needs(student=("features",), teacher=("features",)),
        "stage_object": Needs(student=("features", "stages"), teacher=("stages",)),
        "stage_background": Needs(student=("features", "stages"), teacher=("stages",)),
        "head_object": Needs(student=("proposals", "rois"), teacher=("proposals", "rois")),
        "head_background": Needs(student=("proposals", "rois"), teacher=("proposals", "rois")),
    }

    @configurable
    def __init__(
        self,
        *,
        terms: Sequence[str],
        levels: Sequence[Tuple[Level, Level]] = (),
        stages: Sequence[Tuple[Level, Level]] = (),
        finest: Level,
        num_classes: int = 0,
        assign: str = "official",
        sampling: str = "teacher",
        temperatures: Tuple[float, float] = (1.0, 1.0),
        cascade_stage: int = 0,
    ):
        """
        Args:
            terms: which of :attr:`requires` to compute.
            levels: (student, teacher) FPN levels of equal stride, finest first.
            stages: (student, teacher) backbone stages of equal stride.
            finest: the student's finest FPN level, on which the stages' mask is drawn.
            num_classes: K of the box heads.
            assign: one of :data:`ASSIGNMENTS`.
            sampling: one of :data:`SAMPLINGS`.
            temperatures: of the head's object and background term.
            cascade_stage: which box head of a cascade, from 0.
        """
        super().__init__(terms, num_levels=len(levels))
        self.levels = list(levels)
        self.stages = list(stages)
        self.finest = finest
        self.num_classes = num_classes
        self.assign = assign
        self.sampling = sampling
        self.temperatures = temperatures
        self.cascade_stage = cascade_stage
        if sampling == "student":
            heads = Needs(student=("proposals", "rois"), teacher=("rois",))
            self.requires = {**self.requires, "head_object": heads, "head_background": heads}
        self.neck_adapters = near_zero_adapters([(s.channels, t.channels) for s, t in levels])
        self.stage_adapters = near_zero_adapters([(s.channels, t.channels) for s, t in stages])

    @classmethod
    def default_config(cls) -> CfgNode:
        node = CfgNode()
        # λ of the only released config (VOC); 4 and 16 on COCO, says the author
        node.NECK_OBJECT = term_config(weight=3.0)
        node.NECK_BACKGROUND = term_config(weight=12.0)
        # Off in the released config. The mean over STAGES
        node.STAGE_OBJECT = term_config(weight=0.0)
        node.STAGE_BACKGROUND = term_config(weight=0.0)
        # Off in the released config, which has 2 and 2 here; two-stage detectors only
        node.HEAD_OBJECT = term_config(weight=0.0)
        node.HEAD_BACKGROUND = term_config(weight=0.0)
        # official: a box is an object on the one level of its size; all_levels: on each;
        # everywhere: no decoupling, NECK_OBJECT and STAGE_OBJECT take the whole map
        node.ASSIGN = "official"
        # The student's backbone stages to imitate; the teacher's are those of equal stride
        node.STAGES = ["res3", "res4", "res5"]
        # Whose proposals the heads are compared on: teacher (the student's box head runs once
        # more), student, or both (the sum of the two)
        node.SAMPLING = "teacher"
        # Temperature of the softmax in HEAD_OBJECT and HEAD_BACKGROUND
        node.OBJECT_TEMPERATURE = 1.0
        node.BACKGROUND_TEMPERATURE = 1.0
        # Which box head of a Cascade R-CNN, from 0
        node.CASCADE_STAGE = 0
        return node

    @classmethod
    def from_config(cls, cfg, student, teacher) -> Dict:
        node, terms = cls.node(cfg), cls.enabled_terms(cfg)
        _check_config(node, terms)
        # The parts that are on, and the key to blame when the detectors do not fit
        keys = {t.split("_")[0]: f"DISTILL.DEFEAT.{t.upper()}.WEIGHT" for t in reversed(terms)}
        levels, stages = [], []
        if "neck" in keys:
            pairs = paired_levels(student, teacher, keys["neck"])
            levels = [(student.levels[i], teacher.levels[j]) for i, j in pairs]
        if "stage" in keys:
            stages = paired_stages(student, teacher, node.STAGES, "DISTILL.DEFEAT.STAGES")
        if "head" in keys:
            for family in (student, teacher):
                family.box_head.check_stage(
                    node.CASCADE_STAGE, "DISTILL.DEFEAT.CASCADE_STAGE", family.name
                )
            student.box_head.check_same_outputs(teacher.box_head, node.CASCADE_STAGE, keys["head"])
        return {
            "terms": terms,
            "levels": levels,
            "stages": stages,
            "finest": student.levels[0],
            "num_classes": student.num_classes,
            "assign": node.ASSIGN,
            "sampling": node.SAMPLING,
            "temperatures": (node.OBJECT_TEMPERATURE, node.BACKGROUND_TEMPERATURE),
            "cascade_stage": node.CASCADE_STAGE,
        }

    def levels_of(self, term: str) -> int:
        return self.num_levels if term.startswith("neck") else 0

    def forward(self, student, teacher, targets) -> Dict[str, Tensor]:
        losses = {}
        for part in (self.neck, self.stage, self.head):
            names = [f"{part.__name__}_object", f"{part.__name__}_background"]
            if any(self.wants(name) for name in names):
                losses.update(zip(names, part(student, teacher, targets)))
        return {name: value for name, value in losses.items() if self.wants(name)}

    def neck(self, student, teacher, targets) -> Tuple[Tensor, Tensor]:
        """Both terms of the FPN levels, (L,) each: one share of the mean per level."""
        ours = [student.features[level.name] for level, _ in self.levels]
        theirs = [teacher.features[level.name] for _, level in self.levels]
        adapted = [conv(x) for conv, x in zip(self.neck_adapters, ours)]
        return _shares_of_mean(adapted, theirs, self.masks(student, targets))

    def stage(self, student, teacher, targets) -> Tuple[Tensor, Tensor]:
        """Both terms of the backbone stages, scalars."""
        ours = [student.stages[stage.name] for stage, _ in self.stages]
        theirs = [teacher.stages[stage.name] for _, stage in self.stages]
        # All boxes together, drawn on the finest level and brought to the size of each stage
        size = student.features[self.finest.name].shape[-2:]
        (mask,) = object_masks(_boxes(targets), [size], [self.finest.stride], self.assign)
        masks = [F.interpolate(mask[:, None].float(), x.shape[-2:])[:, 0] for x in ours]
        adapted = [conv(x).relu() for conv, x in zip(self.stage_adapters, ours)]
        objects, backgrounds = _shares_of_mean(adapted, theirs, masks)
        return objects.sum(), backgrounds.sum()

    def head(self, student, teacher, targets) -> Tuple[Tensor, Tensor]:
        """Both terms of the RoI classes, scalars, on the proposals of :attr:`sampling`."""
        samplers = {"student": [student], "teacher": [teacher], "both": [student, teacher]}
        losses = []
        for sampler in samplers[self.sampling]:
            proposals = sampler.proposals_of(self.cascade_stage)
            boxes = [p.proposal_boxes for p in proposals]
            losses.append(
                decoupled_classification(
                    student.rois(boxes, self.cascade_stage).logits,
                    teacher.rois(boxes, self.cascade_stage).logits,
                    torch.cat([p.gt_classes for p in proposals]),
                    self.num_classes,
                    *self.temperatures,
                )
            )
        return tuple(sum(term) for term in zip(*losses))

    def masks(self, student, targets) -> List[Tensor]:
        """Where objects are on each paired FPN level, (N, h, w) bool each."""
        sizes = [student.features[level.name].shape[-2:] for level, _ in self.levels]
        strides = [level.stride for level, _ in self.levels]
        return object_masks(_boxes(targets), sizes, strides, self.assign)

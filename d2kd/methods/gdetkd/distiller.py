"""G-DetKD: Towards General Distillation Framework for Object Detectors via Contrastive and
Semantic-guided Feature Imitation (Yao et al., ICCV 2021, https://arxiv.org/abs/2108.07482).

A two-stage teacher and a student of any kind are compared region by region: features (SGFI), the
relations of regions (CKD) and, between two-stage detectors, classes and boxes. There is no released
code, and the paper's text could not be compared: the formulas follow a published reading note, the
numbers that it lacks a re-implementation that is said to reproduce the gain. The help of every
config key says where its default is from. Formulas: docs/methods/gdetkd.md.

Shapes: R regions, K classes, L student levels.
"""

from typing import Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor, nn

from d2kd.errors import UserError, nearest
from d2kd.layers import as_float
from d2kd.methods.core import DISTILLER_REGISTRY, Defaults, Distiller, Terms
from d2kd.views import (
    Family,
    Features,
    Level,
    Reads,
    Regions,
    RegionSet,
    StudentView,
    TeacherView,
    paired_levels,
)

from .config import KEYS
from .contrast import RegionContrast
from .dense_regions import DenseSampling
from .imitation import (
    AssignedImitation,
    MaskedImitation,
    SoftImitation,
    TeacherSoftImitation,
)
from .predictions import class_aware_localization, classification_kl
from .regions import DenseRegions, TwoStageRegions, hidden_read, hidden_vectors

KEY = "DISTILL.GDETKD"
_PREDICTIONS = Regions(predictions=True)


@DISTILLER_REGISTRY.register()
class GDetKD(Distiller):
    """Feature imitation with soft level matching ("sgfi"), contrast of regions ("ckd"), and class
    and box predictions ("cls", "bbox") on the same regions."""

    keys = KEYS
    # A dense student's predictions do not mean what a box head's do.
    defaults_of = {
        kind: Defaults({"CLS.WEIGHT": 0.0, "BBOX.WEIGHT": 0.0}, "features and contrast alone")
        for kind in ("RetinaNet", "FCOS", "PaperFCOS", "ATSS", "GFL")
    }
    defaults_of["GeneralizedRCNN"] = Defaults(
        {}, "those of a note on the paper and of a re-implementation (docs/methods/gdetkd.md)"
    )

    @configurable
    def __init__(
        self,
        *,
        terms: Sequence[str],
        num_classes: int,
        source: Optional[Union[TwoStageRegions, DenseRegions]],
        foreground_only: bool,
        imitation: Optional[nn.Module],
        contrast: Optional[RegionContrast],
        pre_activation: bool,
        delta_scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        head_transfer: bool,
    ):
        """
        Args:
            terms: which of "sgfi", "ckd", "cls" and "bbox" to compute.
            num_classes: K of the student.
            source: where regions and the student's vectors of them come from, if any term needs
                regions.
            foreground_only: leave out background regions.
            imitation: for "sgfi".
            contrast: for "ckd".
            pre_activation: contrast the teacher's vectors before their last activation.
            delta_scale: what turns the teacher's four box deltas into the student's units.
            head_transfer: start the student's box head as a copy of the teacher's.
        """
        super().__init__(terms)
        self.num_classes = num_classes
        self.source = source
        self.foreground_only = foreground_only
        self.imitation = imitation
        self.contrast = contrast
        self.hidden_read = hidden_read(pre_activation)
        self.register_buffer("delta_scale", torch.tensor(delta_scale), persistent=False)
        self.head_transfer = head_transfer

    @classmethod
    def reads(cls, node: CfgNode, student: Family, teacher: Family) -> Dict[str, Reads]:
        imitation = _imitation_class(node)
        masked = Reads((Features(),), imitation.teacher_reads)
        if not _on_regions(node):
            return {"sgfi": masked}
        source = _source(node, student)
        ours, theirs = source.reads()
        hidden = hidden_read(node.PRE_ACTIVATION)
        on_regions = Reads((Features(), *ours), (*theirs, *imitation.teacher_reads))
        reads = {
            "sgfi": on_regions if imitation.on_regions else masked,
            "ckd": Reads((Features(), *ours, *source.vector_reads()), (*theirs, hidden)),
            "cls": Reads((*ours, _PREDICTIONS), (*theirs, _PREDICTIONS)),
            "bbox": Reads((*ours, _PREDICTIONS), (*theirs, _PREDICTIONS)),
        }
        return {name: reads[name] for name in cls.enabled_terms(node)}

    @classmethod
    def check_config(cls, node: CfgNode) -> None:
        super().check_config(node)
        if node.HEAD_TRANSFER and not cls.enabled_terms(node):
            raise UserError(
                f"{KEY}.HEAD_TRANSFER is True, but all weights of the method are 0, so that none "
                "of it runs: for the transfer alone, give CLS.WEIGHT 1 and CLS.STOP_ITER 1"
            )

    @classmethod
    def check_pair(cls, node: CfgNode, student: Family, teacher: Family) -> None:
        terms = cls.enabled_terms(node)
        for name in ("cls", "bbox"):
            if name in terms:
                student.box_head.check_same_classes(teacher.box_head, 0, cls.term_key(name))
        _check_two_stage(node, student, teacher, "sgfi" in terms)
        if (
            node.FOREGROUND_ONLY
            and node.PROPOSALS_FROM == "teacher"
            and student.num_classes != teacher.num_classes
        ):
            raise UserError(
                f"{KEY}.FOREGROUND_ONLY is True and {KEY}.PROPOSALS_FROM is 'teacher', which "
                f"labels {teacher.num_classes} classes, but the student has "
                f"{student.num_classes} classes: set one of the two to its default"
            )
        if "sgfi" in terms:
            _build_imitation(node, student, teacher)  # raises what there is to say of levels

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        terms = cls.enabled_terms(cfg)
        compares_boxes = "bbox" in terms
        return {
            "terms": terms,
            "num_classes": student.num_classes,
            "source": _source(cfg, student) if _on_regions(cfg) else None,
            "foreground_only": cfg.FOREGROUND_ONLY,
            "imitation": _build_imitation(cfg, student, teacher) if "sgfi" in terms else None,
            "contrast": _build_contrast(cfg, student, teacher) if "ckd" in terms else None,
            "pre_activation": cfg.PRE_ACTIVATION,
            **({"delta_scale": _delta_scale(student, teacher)} if compares_boxes else {}),
            "head_transfer": cfg.HEAD_TRANSFER,
        }

    def initialize_student(self, student: Family, teacher: Family) -> List[str]:
        if not self.head_transfer:
            return []
        student.box_head.copy_from(teacher.box_head, f"{KEY}.HEAD_TRANSFER")
        return ["box head and box predictor: the teacher's (HEAD_TRANSFER)"]

    def no_weight_decay(self) -> Set[str]:
        names = {name for name, _ in self.named_parameters()}
        return names & {"imitation.log_temperature"}

    def forward(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Terms:
        wanted = {term for term in self.terms if self.wants(term)}
        losses, diagnostics = {}, {}
        regions = None
        if wanted - {"sgfi"} or ("sgfi" in wanted and self.imitation.on_regions):
            regions = self.regions(student, teacher, targets)
        if "sgfi" in wanted:
            where = regions if self.imitation.on_regions else targets
            losses["sgfi"], diagnostics["sgfi"] = self.imitation(student, teacher, where)
        if "ckd" in wanted:
            losses["ckd"], diagnostics["ckd"] = self.region_contrast(student, teacher, regions)
        if wanted & {"cls", "bbox"}:
            predictions = self.predictions(student, teacher, regions)
            losses.update({name: x for name, x in predictions.items() if name in wanted})
        return Terms(losses, diagnostics)

    def regions(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> RegionSet:
        """The boxes of this step, without gradient."""
        regions = self.source.sample(student, teacher, targets)
        if self.foreground_only:
            regions = regions.where([c < self.num_classes for c in regions.classes])
        return regions

    def region_contrast(
        self, student: StudentView, teacher: TeacherView, regions: RegionSet
    ) -> Tuple:
        """The "ckd" term, a scalar, and what can be logged."""
        ours = self.source.vectors(student, regions)
        theirs = hidden_vectors(teacher, regions, self.hidden_read)
        return self.contrast(ours, theirs, regions)

    def predictions(
        self, student: StudentView, teacher: TeacherView, regions: RegionSet
    ) -> Dict[str, Tensor]:
        """The "cls" and "bbox" terms, scalars."""
        ours = student.regions(regions, _PREDICTIONS)
        theirs = teacher.regions(regions, _PREDICTIONS)
        return {
            "cls": classification_kl(ours.logits, theirs.logits),
            "bbox": class_aware_localization(
                as_float(theirs.logits).softmax(dim=1),
                theirs.deltas.unflatten(1, (-1, 4)) * self.delta_scale,
                ours.deltas.unflatten(1, (-1, 4)),
            ),
        }


def _on_regions(node: CfgNode) -> bool:
    """Whether any term needs regions: masked imitation does not."""
    terms = GDetKD.enabled_terms(node)
    return _imitation_class(node).on_regions or set(terms) != {"sgfi"}


def _source(node: CfgNode, student: Family) -> Union[TwoStageRegions, DenseRegions]:
    """Where the regions come from."""
    if student.box_head is not None:
        return TwoStageRegions(node.PROPOSALS_FROM, node.PRE_ACTIVATION)
    if not student.has_assignment:
        raise UserError(
            f"DISTILL.METHODS names GDetKD, which compares regions of an FPN, but the student "
            f"{student.name} has neither a box head on an FPN nor anchors: take another student"
        )
    sampling = DenseSampling(
        pre_nms_topk=node.DENSE.PRE_NMS_TOPK,
        post_nms_topk=node.DENSE.POST_NMS_TOPK,
        rois_per_image=node.DENSE.ROIS_PER_IMAGE,
    )
    return DenseRegions(sampling, student.dense_head.num_blocks("cls"), node.PRE_ACTIVATION)


def _imitation_class(node: CfgNode) -> type:
    soft = {"student": SoftImitation, "teacher": TeacherSoftImitation}[node.AGGREGATE]
    return {"soft": soft, "assigned": AssignedImitation, "gt_mask": MaskedImitation}[node.MATCH]


def _check_two_stage(node: CfgNode, student: Family, teacher: Family, imitates: bool) -> None:
    for name, wrong in (
        ("PROPOSALS_FROM", node.PROPOSALS_FROM != "student"),
        ("HEAD_TRANSFER", node.HEAD_TRANSFER),
    ):
        if wrong and student.box_head is None:
            raise UserError(
                f"{KEY}.{name} is {node[name]}, but the student {student.name} is not a two-stage "
                "detector: leave it at its default"
            )
    for name, wrong in (
        ("HEAD_TRANSFER", node.HEAD_TRANSFER),
        ("AGGREGATE", imitates and _imitation_class(node) is TeacherSoftImitation),
    ):
        if wrong and teacher.box_head is None:
            raise UserError(
                f"{KEY}.{name} is {node[name]}, but the teacher {teacher.name} has no box head: "
                "leave it at its default, or take a two-stage teacher"
            )


def _build_imitation(node: CfgNode, student: Family, teacher: Family) -> nn.Module:
    """The parts of the term "sgfi"."""
    kind = _imitation_class(node)
    if kind is MaskedImitation:
        return MaskedImitation(paired_levels(student, teacher, f"{KEY}.MATCH"))
    size, channels = teacher.box_head.pooled_size, teacher.levels[0].channels
    levels = _student_levels(node, student)
    if kind is not SoftImitation:
        # One student level per region, no coarser than what the teacher pools from
        levels = [lv for lv in levels if lv.stride <= teacher.box_head.coarsest_stride]
        _check_consecutive(levels, "MATCH" if kind is AssignedImitation else "AGGREGATE", node)
    if kind is AssignedImitation:
        return AssignedImitation(levels, channels, size)
    _check_embedding(node.EMBED_DIMS, min(size))
    extra = {"teacher_levels": teacher.levels} if kind is TeacherSoftImitation else {}
    return kind(levels, channels, size, node.EMBED_DIMS, **extra)


def _build_contrast(node: CfgNode, student: Family, teacher: Family) -> RegionContrast:
    """The parts of the term "ckd"."""
    if student.box_head is not None:
        width, num_anchors = student.box_head.hidden_dim(0), 1
    else:
        head = student.dense_head
        blocks, num_anchors = head.num_blocks("cls"), head.num_anchors
        width = head.channels("cls", blocks) if blocks else student.levels[0].channels
    return RegionContrast(
        width,
        teacher.box_head.hidden_dim(0),
        proj_dim=node.PROJ_DIM,
        num_anchors=num_anchors,
        gamma=node.GAMMA,
        positive_in_denominator=node.POSITIVE_IN_DENOMINATOR,
        negative_iou=node.NEGATIVE_IOU,
        queue_size=node.QUEUE_SIZE,
    )


def _delta_scale(student: Family, teacher: Family) -> Tuple[float, ...]:
    """``BBOX_REG_WEIGHTS`` of the two may differ."""
    ours, theirs = (family.box_head.delta_weights(0) for family in (student, teacher))
    return tuple(w_s / w_t for w_s, w_t in zip(ours, theirs))


def _student_levels(node: CfgNode, student: Family) -> List[Level]:
    known = {level.name: level for level in student.levels}
    for name in node.LEVELS:
        if name not in known:
            raise UserError(f"{KEY}.LEVELS names '{name}': {nearest(name, known)}")
    levels = [level for name, level in known.items() if name in (node.LEVELS or known)]
    widths = [level.channels for level in levels]
    if len(set(widths)) > 1:
        raise UserError(
            f"{KEY}.LEVELS: one adapter is for all levels of the student, but these have {widths} "
            "channels: name levels of one width"
        )
    return levels


def _check_consecutive(levels: Sequence[Level], name: str, node: CfgNode) -> None:
    strides = [level.stride for level in levels]
    if not strides or any(b != 2 * a for a, b in zip(strides, strides[1:])):
        raise UserError(
            f"{KEY}.{name} is '{node[name]}', but the student's levels up to the teacher's "
            f"coarsest have strides {strides}: give {KEY}.LEVELS of which each has twice the stride"
        )


def _check_embedding(widths: Sequence[int], resolution: int) -> None:
    size = resolution
    for _ in widths:
        size = (size - 3) // 2 + 1 if size >= 3 else 0
    if not widths or size < 1:
        raise UserError(
            f"{KEY}.EMBED_DIMS is {list(widths)}, but convolutions of stride 2 have to leave "
            f"something of the teacher's {resolution} x {resolution} regions: give one or more "
            "widths, two for 7 x 7"
        )

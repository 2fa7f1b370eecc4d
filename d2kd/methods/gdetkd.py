"""G-DetKD: Towards General Distillation Framework for Object Detectors via Contrastive and
Semantic-guided Feature Imitation (Yao et al., ICCV 2021, https://arxiv.org/abs/2108.07482).

A two-stage teacher and a student of any kind are compared region by region: features (SGFI), the
relations of regions (CKD) and, between two-stage detectors, classes and boxes. There is no released
code, and the paper's text could not be compared: the formulas follow a published reading note, the
numbers that it lacks a re-implementation that reproduces the paper's gain. The comment of every
config key says where its default is from.

Shapes: R regions, K classes, L student levels.
"""

from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.methods.channel_statistics import as_float
from d2kd.methods.contrastive import RegionContrast, contrastive_loss
from d2kd.methods.dense_rois import DenseSampling, dense_rois, vectors_of
from d2kd.methods.distiller import DISTILLER_REGISTRY, Distiller, Needs
from d2kd.methods.gdetkd_config import (
    build_contrast,
    build_imitation,
    build_sampling,
    check_config,
    check_pair,
    gdetkd_config,
    transfer_heads,
)
from d2kd.methods.semantic_guided import MaskedImitation, match_levels
from d2kd.modeling.families import Family

__all__ = ["GDetKD", "class_aware_localization", "contrastive_loss", "match_levels"]


def class_aware_localization(
    teacher_probs: Tensor, teacher_deltas: Tensor, student_deltas: Tensor
) -> Tensor:
    """L1 distance of the boxes' deltas, averaged over classes with the teacher's probabilities.

    Args:
        teacher_probs: (R, K + 1) softmax, background last; it is left out and gets no share.
        teacher_deltas, student_deltas: (R, K, 4), or (R, 1, 4) if class-agnostic.

    Returns:
        a scalar, Σ |Σ_c p_c (t_c − s_c)| / R, summed over the four deltas; 0 without regions.
    """
    weights = as_float(teacher_probs.detach())[:, :-1, None]
    difference = as_float(teacher_deltas.detach()) - as_float(student_deltas)
    return (weights * difference).sum(dim=1).abs().sum() / max(len(difference), 1)


def classification_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL divergence of the class distributions, T² Σ KL(softmax(z_t / T) ‖ softmax(z_s / T)) / R.

    Args:
        student_logits, teacher_logits: (R, K + 1).
        temperature: T > 0.

    Returns:
        a scalar; 0 without regions.
    """
    log_p = (as_float(student_logits) / temperature).log_softmax(dim=1)
    log_q = (as_float(teacher_logits.detach()) / temperature).log_softmax(dim=1)
    kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return temperature**2 * kl / max(len(log_p), 1)


class Regions(NamedTuple):
    """The boxes on which student and teacher are compared."""

    boxes: List[Boxes]  # per image
    classes: List[Tensor]  # per image, of the boxes; K = background
    anchors: Optional[List[Tensor]] = None  # of a dense student: which of its anchors made them


@DISTILLER_REGISTRY.register()
class GDetKD(Distiller):
    """Feature imitation with soft level matching ("sgfi"), contrast of regions ("ckd"), and class
    and box predictions ("cls", "bbox") on the same regions."""

    requires = {
        "sgfi": Needs(student=("features",), teacher=("rois",)),
        "ckd": Needs(student=("features",), teacher=("rois",)),
        "cls": Needs(student=("proposals", "rois"), teacher=("rois",)),
        "bbox": Needs(student=("proposals", "rois"), teacher=("rois",)),
    }

    @configurable
    def __init__(
        self,
        *,
        terms: Sequence[str],
        num_classes: int,
        imitation: Optional[nn.Module] = None,
        contrast: Optional[RegionContrast] = None,
        kl_temperature: float = 1.0,
        source: str = "student",
        foreground_only: bool = False,
        dense: Optional[DenseSampling] = None,
        dense_blocks: int = 0,
        append_gt: bool = False,
    ):
        """
        Args:
            terms: which of :attr:`requires` to compute.
            num_classes: K of the student.
            imitation: for "sgfi"; soft or assigned, or masked.
            contrast: for "ckd".
            kl_temperature: for "cls".
            source: whose proposals are the regions of a two-stage student, student or teacher.
            foreground_only: leave out background regions.
            dense: how to sample regions of a dense student; None for a two-stage student.
            dense_blocks: blocks of a dense student's class tower.
            append_gt: add the objects to the regions of a dense student's "sgfi".
        """
        super().__init__(terms)
        self.num_classes = num_classes
        self.imitation = imitation
        self.contrast = contrast
        self.kl_temperature = kl_temperature
        self.source = source
        self.foreground_only = foreground_only
        self.dense = dense
        self.dense_blocks = dense_blocks
        self.append_gt = append_gt
        self.requires = {term: self._needs(term) for term in self.requires}

    def _needs(self, term: str) -> Needs:
        if self.dense is None:
            teacher = ("proposals", "rois") if self.source == "teacher" else ("rois",)
            return Needs(student=("features", "proposals", "rois"), teacher=teacher)
        tower = (f"tower.{self.dense_blocks}",) if term == "ckd" else ()
        return Needs(student=("features", "dense", *tower), teacher=("rois",))

    @classmethod
    def default_config(cls) -> CfgNode:
        return gdetkd_config()

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        node, terms = cls.node(cfg), cls.enabled_terms(cfg)
        check_config(node)
        check_pair(node, terms, student, teacher)
        transfer_heads(node, student, teacher)
        two_stage = "rois" in student.offers
        return {
            "terms": terms,
            "num_classes": student.num_classes,
            "imitation": build_imitation(node, student, teacher) if "sgfi" in terms else None,
            "contrast": build_contrast(node, student, teacher) if "ckd" in terms else None,
            "kl_temperature": node.KL_TEMPERATURE,
            "source": node.ROIS,
            "foreground_only": node.FOREGROUND_ONLY,
            "dense": None if two_stage else build_sampling(node),
            "dense_blocks": 0 if two_stage else student.dense_head.num_blocks("cls"),
            "append_gt": node.DENSE.APPEND_GT_FOR_SGFI and not two_stage,
        }

    def forward(self, student, teacher, targets) -> Dict[str, Tensor]:
        regions = self.regions(student, teacher, targets)
        losses = {}
        if self.wants("sgfi"):
            losses["sgfi"] = self.imitate(student, teacher, regions, targets)
        if self.wants("ckd"):
            losses["ckd"] = self.region_contrast(student, teacher, regions)
        if self.wants("cls") or self.wants("bbox"):
            losses.update(self.predictions(student, teacher, regions.boxes))
        return {name: value for name, value in losses.items() if self.wants(name)}

    def regions(self, student, teacher, targets) -> Regions:
        """The boxes of this step, without gradient."""
        if self.dense is not None:
            proposals = dense_rois(student, targets, self.dense)
        else:
            proposals = (teacher if self.source == "teacher" else student).proposals
        if self.foreground_only:
            proposals = [p[p.gt_classes < self.num_classes] for p in proposals]
        return Regions(
            [p.proposal_boxes for p in proposals],
            [p.gt_classes for p in proposals],
            None if self.dense is None else [p.anchors for p in proposals],
        )

    def imitate(self, student, teacher, regions: Regions, targets) -> Tensor:
        """The "sgfi" term, a scalar."""
        objects = [t.gt_boxes for t in targets]
        if isinstance(self.imitation, MaskedImitation):
            return self.imitation(student.features, teacher.features, objects)
        boxes = regions.boxes
        if self.append_gt:
            boxes = [Boxes.cat([b, gt]) for b, gt in zip(boxes, objects)]
        return self.imitation(student.features, boxes, teacher.rois(boxes).features)

    def region_contrast(self, student, teacher, regions: Regions) -> Tensor:
        """The "ckd" term, a scalar."""
        if regions.anchors is None:
            anchor, vectors = None, student.rois(regions.boxes).hidden
        else:
            num_anchors = student.family.dense_head.num_anchors
            anchor = torch.cat(regions.anchors) % num_anchors
            tower = student.dense.tower("cls", self.dense_blocks)
            vectors = vectors_of(tower, regions.anchors, num_anchors)
        classes = [c.masked_fill(c == self.num_classes, -1) for c in regions.classes]
        return self.contrast(
            vectors, teacher.rois(regions.boxes).hidden, regions.boxes, classes, anchor
        )

    def predictions(self, student, teacher, boxes: List[Boxes]) -> Dict[str, Tensor]:
        """The "cls" and "bbox" terms, scalars."""
        ours, theirs = student.rois(boxes), teacher.rois(boxes)
        return {
            "cls": classification_kl(ours.logits, theirs.logits, self.kl_temperature),
            "bbox": class_aware_localization(
                as_float(theirs.logits).softmax(dim=1),
                theirs.deltas.unflatten(1, (-1, 4)),
                ours.deltas.unflatten(1, (-1, 4)),
            ),
        }

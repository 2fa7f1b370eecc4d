"""G-DetKD: Towards General Distillation Framework for Object Detectors via Contrastive and
Semantic-guided Feature Imitation (Yao et al., ICCV 2021, https://arxiv.org/abs/2108.07482).

A two-stage teacher and a student of any kind are compared region by region: features (SGFI), the
relations of regions (CKD) and, between two-stage detectors, classes and boxes. There is no released
code, and the paper's text could not be compared: the formulas follow a published reading note, the
numbers that it lacks a re-implementation that reproduces the paper's gain. The comment of every
config key says where its default is from.

Shapes: R regions, K classes, L student levels.
"""

from typing import Dict, List, Optional, Sequence, Union

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.methods.contrastive import RegionContrast, contrastive_loss
from d2kd.methods.distiller import DISTILLER_REGISTRY, Distiller, Needs
from d2kd.methods.gdetkd_config import (
    build_contrast,
    build_imitation,
    build_regions,
    check_config,
    check_pair,
    delta_units,
    gdetkd_config,
    transfer_heads,
)
from d2kd.methods.regions import DenseRegions, Regions, TwoStageRegions, hidden_vectors
from d2kd.methods.semantic_guided import MaskedImitation, match_levels
from d2kd.modeling.channel_statistics import as_float
from d2kd.modeling.families import Family

__all__ = ["GDetKD", "class_aware_localization", "contrastive_loss", "match_levels"]


def class_aware_localization(
    teacher_probs: Tensor,
    teacher_deltas: Tensor,
    student_deltas: Tensor,
    mean_over_deltas: bool = False,
) -> Tensor:
    """L1 distance of the boxes' deltas, averaged over classes with the teacher's probabilities.

    Args:
        teacher_probs: (R, K + 1) softmax, background last; it is left out and gets no share.
        teacher_deltas, student_deltas: (R, K, 4), or (R, 1, 4) if class-agnostic, which then
            stands for every class; the two may differ in this.
        mean_over_deltas: divide by four.

    Returns:
        a scalar, Σ |Σ_c p_c (t_c − s_c)| / R, summed over the four deltas; 0 without regions.
    """
    weights = as_float(teacher_probs.detach())[:, :-1, None]
    difference = as_float(teacher_deltas.detach()) - as_float(student_deltas)
    distance = (weights * difference).sum(dim=1).abs()  # (R, 4)
    count = distance.numel() if mean_over_deltas else len(distance)
    return distance.sum() / max(count, 1)


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
        source: Union[TwoStageRegions, DenseRegions],
        foreground_only: bool = False,
        imitation: Optional[nn.Module] = None,
        append_gt: bool = False,
        contrast: Optional[RegionContrast] = None,
        kl_temperature: float = 1.0,
        delta_scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        mean_over_deltas: bool = False,
    ):
        """
        Args:
            terms: which of :attr:`requires` to compute.
            num_classes: K of the student.
            source: where regions and the student's vectors of them come from.
            foreground_only: leave out background regions.
            imitation: for "sgfi"; on regions, or masked.
            append_gt: add the objects to the regions of "sgfi".
            contrast: for "ckd".
            kl_temperature: for "cls".
            delta_scale: what turns the teacher's four box deltas into the student's units.
            mean_over_deltas: for "bbox", see :func:`class_aware_localization`.
        """
        super().__init__(terms)
        self.num_classes = num_classes
        self.source = source
        self.foreground_only = foreground_only
        self.imitation = imitation
        self.append_gt = append_gt
        self.contrast = contrast
        self.kl_temperature = kl_temperature
        self.register_buffer("delta_scale", torch.tensor(delta_scale), persistent=False)
        self.mean_over_deltas = mean_over_deltas
        self.masked = isinstance(imitation, MaskedImitation)
        self.requires = {term: source.needs(term) for term in self.requires}
        if self.masked:
            self.requires["sgfi"] = Needs(student=("features",), teacher=("features",))

    def undecayed(self) -> List[nn.Parameter]:
        return [p for n, p in self.named_parameters() if n == "imitation.log_temperature"]

    @classmethod
    def default_config(cls) -> CfgNode:
        return gdetkd_config()

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        node, terms = cls.node(cfg), cls.enabled_terms(cfg)
        check_config(node)
        check_pair(node, terms, student, teacher)
        transfer_heads(node, student, teacher)
        return {
            "terms": terms,
            "num_classes": student.num_classes,
            "source": build_regions(node, student),
            "foreground_only": node.FOREGROUND_ONLY,
            "imitation": build_imitation(node, student, teacher) if "sgfi" in terms else None,
            "append_gt": node.DENSE.APPEND_GT_FOR_SGFI and "rois" not in student.offers,
            "contrast": build_contrast(node, student, teacher) if "ckd" in terms else None,
            "kl_temperature": node.KL_TEMPERATURE,
            **(delta_units(student, teacher) if "bbox" in terms else {}),
            "mean_over_deltas": node.MEAN_OVER_DELTAS,
        }

    def forward(self, student, teacher, targets) -> Dict[str, Tensor]:
        objects = [target.gt_boxes for target in targets]
        on_regions = {term for term in self.terms if self.wants(term)}
        losses = {}
        if self.masked and "sgfi" in on_regions:
            on_regions.remove("sgfi")
            losses["sgfi"] = self.imitation(student.features, teacher.features, objects)
        if not on_regions:
            return losses
        regions = self.regions(student, teacher, targets)
        if "sgfi" in on_regions:
            losses["sgfi"] = self.imitate(student, teacher, regions.boxes, objects)
        if "ckd" in on_regions:
            losses["ckd"] = self.region_contrast(student, teacher, regions)
        if on_regions & {"cls", "bbox"}:
            losses.update(self.predictions(student, teacher, regions.boxes))
        return {name: value for name, value in losses.items() if self.wants(name)}

    def regions(self, student, teacher, targets) -> Regions:
        """The boxes of this step, without gradient."""
        proposals = self.source.sample(student, teacher, targets)
        boxes = [p.proposal_boxes for p in proposals]
        if self.foreground_only:
            kept = [p.gt_classes < self.num_classes for p in proposals]
            boxes = student.select(boxes, kept)
            proposals = [p[k] for p, k in zip(proposals, kept)]
        anchors = [p.anchors for p in proposals] if proposals[0].has("anchors") else None
        return Regions(boxes, [p.gt_classes for p in proposals], anchors)

    def imitate(self, student, teacher, boxes: List[Boxes], objects: List[Boxes]) -> Tensor:
        """The "sgfi" term on regions, a scalar."""
        if self.append_gt:
            boxes = [Boxes.cat(both) for both in zip(boxes, objects)]
        target = self.imitation_target(teacher, boxes)
        return self.imitation(student.features, boxes, target)

    def imitation_target(self, teacher, boxes: List[Boxes]) -> Tensor:
        """What of the teacher the regions imitate."""
        if self.imitation.weighs_teacher:
            return self.imitation.pool_teacher(teacher.features, boxes)
        return teacher.rois(boxes).features

    def region_contrast(self, student, teacher, regions: Regions) -> Tensor:
        """The "ckd" term, a scalar."""
        vectors, anchor = self.source.vectors(student, regions)
        theirs = hidden_vectors(teacher, regions.boxes, self.source.pre_relu)
        classes = [c.masked_fill(c == self.num_classes, -1) for c in regions.classes]
        return self.contrast(vectors, theirs, regions.boxes, classes, anchor)

    def predictions(self, student, teacher, boxes: List[Boxes]) -> Dict[str, Tensor]:
        """The "cls" and "bbox" terms, scalars."""
        ours, theirs = student.rois(boxes), teacher.rois(boxes)
        return {
            "cls": classification_kl(ours.logits, theirs.logits, self.kl_temperature),
            "bbox": class_aware_localization(
                as_float(theirs.logits).softmax(dim=1),
                theirs.deltas.unflatten(1, (-1, 4)) * self.delta_scale,
                ours.deltas.unflatten(1, (-1, 4)),
                self.mean_over_deltas,
            ),
        }

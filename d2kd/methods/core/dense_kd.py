"""Losses between the class, box and centerness predictions of two dense heads, as CrossKD's code
has them for RetinaNet, FCOS, ATSS and GFL: base of the methods that compare predictions.

Shapes: N images, A anchors per location, R anchors of all levels (level, row, column, anchor),
K classes, (h, w) the size of a level, L levels.
"""

from typing import Dict, List, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from d2kd.errors import UserError
from d2kd.layers import (
    as_float,
    box_distribution_kl,
    flatten_scalars,
    highest_logits,
    iou_log_loss,
    paired_iou,
    quality_focal_kd,
)
from d2kd.schema import Key
from d2kd.views import (
    Dense,
    Family,
    StudentView,
    TeacherView,
    View,
)
from d2kd.views.comparable import (
    ANCHOR_SHAPES,
    ANCHORS,
    BINS,
    BOX_FORM,
    CLASSES,
    LEVELS,
    check_same,
)

from .distiller import Defaults, Distiller
from .schedule import term

EPS = torch.finfo(torch.float32).eps

# The prediction that each term compares
OUTPUTS = {"cls": "logits", "bbox": "deltas", "centerness": "centerness"}
# What of the teacher's it reads; its class scores weight the boxes
TARGETS = {
    "cls": Dense(("logits",)),
    "bbox": Dense(("logits", "deltas")),
    "centerness": Dense(("centerness",)),
}
# The box loss that the authors' code has for what a detector predicts
BOX_LOSS_OF = {"deltas": "giou", "distances": "iou", "distribution": "kl"}
# What has to be the same of two heads
FACTS = (BOX_FORM, LEVELS, CLASSES, ANCHORS, ANCHOR_SHAPES, BINS)


def _of_anchors(levels: Sequence[Tensor]) -> Tensor:
    """L maps (N, A, h, w) -> (N, R)."""
    return torch.cat([flatten_scalars(x) for x in levels], dim=1)


def _weights(cls: float, bbox: float, centerness: float = 0.0) -> Dict[str, float]:
    return {"CLS.WEIGHT": cls, "BBOX.WEIGHT": bbox, "CENTERNESS.WEIGHT": centerness}


class DenseKD(Distiller):
    """Compares predictions with the teacher's. A subclass says which, in :meth:`predictions`.

    Classes: quality focal loss on every anchor. Boxes: on every anchor, weighted with the teacher's
    highest class probability. Centerness: binary cross-entropy on the student's positives.
    """

    keys = {
        "CLS": term(
            1.0,
            "Weight of the class loss; CrossKD's authors' value for RetinaNet, others for other "
            "detectors",
        ),
        "BBOX": term(
            1.0,
            "Weight of the box loss; CrossKD's authors' value for RetinaNet, others for other "
            "detectors",
        ),
        "CENTERNESS": term(
            0.0, "Weight of the centerness loss; only for detectors that predict a centerness"
        ),
        "BBOX_LOSS": Key(
            "",
            "The box loss: kl (of distributions, for GFL), giou, or iou (minus its logarithm); "
            "empty = the authors' for the student's kind of detector",
            choices=("", "kl", "iou", "giou"),
        ),
        "BETA": Key(
            1.0,
            "Exponent of the class loss, a quality focal loss: with a larger one, predictions "
            "close to the teacher's count less",
            low=1,
        ),
        "TEMPERATURE": Key(1.0, "Temperature of the softmax in the kl box loss", above=0),
    }

    # Detectron2's FCOS predicts boxes of no size at first, where the logarithm of the IoU has no
    # gradient: with GIoU, mimicking gains on the embedded data what it loses without.
    defaults_of = {
        "RetinaNet": Defaults(_weights(1.0, 1.0), "CrossKD's authors', for RetinaNet"),
        "ATSS": Defaults(_weights(1.0, 1.0, 1.0), "CrossKD's authors', for ATSS"),
        "GFL": Defaults(_weights(1.0, 4.0), "CrossKD's authors', for GFL"),
        "PaperFCOS": Defaults(_weights(0.4, 0.75), "CrossKD's authors', for FCOS"),
        "FCOS": Defaults(
            {**_weights(0.4, 0.75), "BBOX_LOSS": "giou"},
            "CrossKD's authors', for FCOS, with GIoU instead of log-IoU (docs/results/crosskd.md)",
        ),
    }

    @configurable
    def __init__(
        self,
        *,
        box_loss: str,
        normalizer: str,
        masked: bool,
        box_mean: bool,
        num_levels: int,
        num_anchors: int,
        terms: Sequence[str],
        beta: float,
        temperature: float,
    ):
        """
        Args:
            box_loss: "kl", "giou" or "iou".
            normalizer: what losses are divided by, an attribute of the student's assignment.
            masked: leave out ignored anchors and those outside the image.
            box_mean: divide box losses by the sum of their weights instead.
            num_levels: L.
            num_anchors: A.
            terms: which of "cls", "bbox" and "centerness" to compute.
            beta: of the class loss.
            temperature: of the "kl" box loss.
        """
        super().__init__(terms, num_levels)
        self.box_loss_name = box_loss
        self.normalizer = normalizer
        self.masked = masked
        self.box_mean = box_mean
        self.num_anchors = num_anchors
        self.beta = beta
        self.temperature = temperature

    @classmethod
    def check_pair(cls, node: CfgNode, student: Family, teacher: Family) -> None:
        key = cls.node_name()
        _check_same_head(student, teacher, key)
        _box_loss(student, node.BBOX_LOSS, f"{key}.BBOX_LOSS")

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        key, terms = cls.node_name(), cls.enabled_terms(cfg)
        return {
            "box_loss": _box_loss(student, cfg.BBOX_LOSS, f"{key}.BBOX_LOSS"),
            "normalizer": student.normalizer,
            "masked": student.ignores_anchors,
            "box_mean": student.box_form == "distribution",
            "num_levels": len(student.levels),
            "num_anchors": student.dense_head.num_anchors,
            "terms": terms,
            "beta": cfg.BETA,
            "temperature": cfg.TEMPERATURE,
        }

    def predictions(self, student: StudentView, teacher: TeacherView) -> Dict[str, List[Tensor]]:
        """What is compared with the teacher's predictions: those of "logits", "deltas" and
        "centerness" that the wanted terms need, per level as a head gives them."""
        raise NotImplementedError(f"{type(self).__name__} must say what it compares")

    def box_decoder(self, student: StudentView, teacher: TeacherView) -> View:
        """The view that knows how to decode the compared "deltas"."""
        raise NotImplementedError(f"{type(self).__name__} must say who decodes boxes")

    def forward(
        self, student: StudentView, teacher: TeacherView, targets: List[Instances]
    ) -> Dict[str, Tensor]:
        outputs, targeted = self.predictions(student, teacher), teacher.predictions
        assignment = student.assignment
        counted = assignment.valid if self.masked else 1
        normalizer = getattr(assignment, self.normalizer)
        losses = {}
        if self.wants("cls"):
            loss = self.class_loss(outputs.pop("logits"), targeted.logits)
            losses["cls"] = loss * counted / normalizer
        if self.wants("bbox"):
            loss = self.box_loss(outputs.pop("deltas"), self.box_decoder(student, teacher), teacher)
            highest = [highest_logits(logits, self.num_anchors) for logits in targeted.logits]
            weight = torch.cat(highest, dim=1).sigmoid() * counted
            divisor = weight.sum().clamp(min=EPS) if self.box_mean else normalizer
            losses["bbox"] = loss * weight / divisor
        if self.wants("centerness"):
            loss = self.centerness_loss(outputs.pop("centerness"), targeted.centerness)
            losses["centerness"] = loss * assignment.positive / normalizer
        return {name: _sum_levels(loss, assignment.sizes) for name, loss in losses.items()}

    def class_loss(self, logits: List[Tensor], teacher_logits: List[Tensor]) -> Tensor:
        """L maps (N, A·K, h, w) of both -> (N, R), summed over classes."""
        return _of_anchors(
            [
                quality_focal_kd(x, z, self.beta).unflatten(1, (self.num_anchors, -1)).sum(dim=2)
                for x, z in zip(logits, teacher_logits)
            ]
        )

    def box_loss(self, deltas: List[Tensor], decoder: View, teacher: TeacherView) -> Tensor:
        """
        Args:
            deltas: L maps (N, A·D, h, w), D numbers per box.
            decoder, teacher: the views that decode the deltas and that give the target.

        Returns:
            (N, R).
        """
        targets = teacher.predictions.deltas
        if self.box_loss_name == "kl":
            return _of_anchors(
                [
                    box_distribution_kl(x, z, self.num_anchors, self.temperature)
                    for x, z in zip(deltas, targets)
                ]
            )
        iou, giou = paired_iou(decoder.decode(deltas), teacher.decode(targets))
        return 1 - giou if self.box_loss_name == "giou" else iou_log_loss(iou)

    def centerness_loss(self, logits: List[Tensor], teacher_logits: List[Tensor]) -> Tensor:
        """L maps (N, A, h, w) of both -> (N, R)."""
        target = as_float(_of_anchors(teacher_logits)).sigmoid()
        logits = as_float(_of_anchors(logits))
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def _sum_levels(loss: Tensor, sizes: List[int]) -> Tensor:
    """(N, R) -> (L,)."""
    return torch.stack([x.sum() for x in loss.split(sizes, dim=1)])


def _box_loss(student: Family, chosen: str, key: str) -> str:
    if chosen == "kl" and student.box_form != "distribution":
        raise UserError(
            f"{key} is 'kl', which compares distributions, but {student.name} predicts "
            f"{student.box_form}: give 'giou' or 'iou'"
        )
    return chosen or BOX_LOSS_OF[student.box_form]


def _check_same_head(student: Family, teacher: Family, key: str) -> None:
    """Refuses a pair whose predictions do not stand for the same anchors, classes and bins."""
    for side, family in (("student", student), ("teacher", teacher)):
        if not family.normalizer or family.box_form not in BOX_LOSS_OF:
            raise UserError(
                f"{key} compares predictions one by one, which is not known of the {side} "
                f"{family.name}: take RetinaNet, FCOS, PaperFCOS, ATSS or GFL"
            )
    check_same(student, teacher, FACTS, key)

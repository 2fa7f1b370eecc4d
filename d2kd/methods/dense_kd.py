"""Losses between the class, box and centerness predictions of two dense heads, as CrossKD's code
has them for RetinaNet, FCOS, ATSS and GFL: base of the methods that compare predictions.

Shapes: N images, A anchors per location, R anchors of all levels (level, row, column, anchor),
K classes, (h, w) the size of a level, L levels.
"""

from operator import attrgetter
from typing import Callable, Dict, List, NamedTuple, Sequence

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor
from torch.nn import functional as F

from d2kd.errors import UserError, nearest
from d2kd.methods.distiller import Distiller
from d2kd.methods.schedule import term_config
from d2kd.modeling.channel_statistics import as_float
from d2kd.modeling.families import Assignment, Family
from d2kd.modeling.meta_arch.losses import iou_log_loss, paired_iou

EPS = torch.finfo(torch.float32).eps
# Gradients of smaller size count as none: a CPU takes several times as long for a convolution of
# denormal numbers, which they turn into
_NO_GRADIENT = 1e-30


class LossForm(NamedTuple):
    """What differs from detector to detector in the authors' code."""

    box_loss: str  # one of BOX_LOSSES
    normalizer: Callable[[Assignment], Tensor]  # the losses are divided by it
    masked: bool = True  # leave out ignored anchors and those outside the image
    box_mean: bool = False  # divide box losses by the sum of their weights instead


LOSS_FORMS = {
    "RetinaNet": LossForm("giou", attrgetter("num_positive")),
    "ATSS": LossForm("giou", attrgetter("mean_num_positive")),
    "GFL": LossForm("kl", attrgetter("mean_num_positive"), box_mean=True),
    "FCOS": LossForm("iou", attrgetter("mean_sum_centerness"), masked=False),
}

IOU_LOSSES = {"iou": lambda iou, giou: iou_log_loss(iou), "giou": lambda iou, giou: 1 - giou}
BOX_LOSSES = ("kl", *IOU_LOSSES)


class _QualityFocal(torch.autograd.Function):
    """Computes the gradient along with the loss, in three buffers: these maps are the largest of
    the whole step, and autograd would keep seven of them."""

    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor, beta: float) -> Tensor:
        p, q = x.sigmoid(), z.sigmoid()
        bce = F.softplus(x, threshold=50).addcmul_(x, q, value=-1)
        error = q.neg_().add_(p)
        # loss = |e|^(β-1) |e BCE|, its gradient |e|^(β-1) sign(e) (β p (1-p) BCE + e²)
        gradient = p.addcmul_(p, p, value=-1).mul_(bce).mul_(beta).addcmul_(error, error)
        loss = bce.mul_(error).abs_()
        if beta != 1:
            factor = error.abs().pow_(beta - 1)
            gradient, loss = gradient.mul_(factor), loss.mul_(factor)
        ctx.save_for_backward(F.threshold_(gradient, _NO_GRADIENT, 0.0).mul_(error.sign_()))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.saved_tensors[0] * grad, None, None


def quality_focal_kd(logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """Quality focal loss towards the teacher's probabilities: |σ(x) - q|^β · BCE(x, q), q = σ(z).

    Args:
        logits: x, (M, K) or any other shape.
        teacher_logits: z, same shape; gets no gradient.
        beta: how fast good predictions lose weight, >= 1.

    Returns:
        the loss of every element, same shape.
    """
    return _QualityFocal.apply(as_float(logits), as_float(teacher_logits.detach()), beta)


class _Divergence(torch.autograd.Function):
    """As for the classes: the gradient along with the loss, in half of the memory."""

    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor, temperature: float, dim: int) -> Tensor:
        log_p = (x / temperature).log_softmax(dim)
        log_q = (z / temperature).log_softmax(dim)
        q = log_q.exp()
        loss = log_q.sub_(log_p).mul_(q).sum(dim)
        ctx.dim = dim
        # The gradient of loss · T² is T (p - q)
        ctx.save_for_backward(log_p.exp_().sub_(q).mul_(temperature))
        return loss.mul_(temperature**2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.saved_tensors[0] * grad.unsqueeze(ctx.dim), None, None, None


def localization_kd(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """Kullback-Leibler divergence of two distributions of a box side's distance.

    Args:
        logits: (M, R) with R bins, or any other shape.
        teacher_logits: same shape; gets no gradient.
        temperature: T, divides both.
        dim: the bins.

    Returns:
        T² · Σ q (log q - log p), the shape without ``dim``.
    """
    return _Divergence.apply(as_float(logits), as_float(teacher_logits.detach()), temperature, dim)


def _flatten(levels: List[Tensor]) -> Tensor:
    """L maps (N, A, h, w) -> (N, R)."""
    return torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in levels], dim=1)


class DenseKD(Distiller):
    """Compares predictions with the teacher's. A subclass says which, in :meth:`predictions`.

    Classes: quality focal loss on every anchor. Boxes: on every anchor, weighted with the teacher's
    highest class probability. Centerness: binary cross-entropy on the student's positives.
    """

    @configurable
    def __init__(
        self,
        *,
        form: LossForm,
        num_levels: int,
        num_anchors: int,
        terms: Sequence[str] = ("cls", "bbox"),
        beta: float = 1.0,
        temperature: float = 1.0,
    ):
        """
        Args:
            form: what is particular to the detector.
            num_levels: L.
            num_anchors: A.
            terms: which of "cls", "bbox" and "centerness" to compute.
            beta: of the class loss.
            temperature: of the "kl" box loss.
        """
        super().__init__(terms, num_levels)
        self.form = form
        self.num_anchors = num_anchors
        self.beta = beta
        self.temperature = temperature

    @classmethod
    def default_config(cls) -> CfgNode:
        node = CfgNode()
        # Weights of the released RetinaNet config; they differ by detector, see configs/crosskd
        node.CLS = term_config(weight=1.0)
        node.BBOX = term_config(weight=1.0)
        # Only for detectors that predict a centerness
        node.CENTERNESS = term_config(weight=0.0)
        # kl (distributions, GFL), giou or iou (its logarithm); empty = as the authors do for the
        # student's kind of detector
        node.BBOX_LOSS = ""
        # Exponent of the class loss
        node.BETA = 1.0
        # Temperature of the kl box loss
        node.TEMPERATURE = 1.0
        return node

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        node, key = cls.node(cfg), f"DISTILL.{cls.__name__.upper()}"
        _check_same_head(student, teacher, key)
        terms = cls.enabled_terms(cfg)
        if "centerness" in terms and not student.dense_head.has_centerness:
            raise UserError(
                f"{key}.CENTERNESS.WEIGHT is {node.CENTERNESS.WEIGHT}, but {student.name} predicts "
                "no centerness: set it to 0"
            )
        if node.BETA < 1:
            raise UserError(f"{key}.BETA is {node.BETA}: give 1 or more")
        if node.TEMPERATURE <= 0:
            raise UserError(f"{key}.TEMPERATURE is {node.TEMPERATURE}: give more than 0")
        return {
            "form": _loss_form(student, node.BBOX_LOSS, f"{key}.BBOX_LOSS"),
            "num_levels": len(student.levels),
            "num_anchors": student.dense_head.num_anchors,
            "terms": terms,
            "beta": node.BETA,
            "temperature": node.TEMPERATURE,
        }

    def predictions(self, student, teacher) -> Dict[str, List[Tensor]]:
        """What is compared with the teacher's predictions: those of "logits", "deltas" and
        "centerness" that the wanted terms need, per level as a head gives them."""
        raise NotImplementedError(f"{type(self).__name__} must say what it compares")

    def coder(self, student, teacher):
        """The dense head, in a view, that knows how to decode the compared "deltas"."""
        raise NotImplementedError(f"{type(self).__name__} must say who decodes boxes")

    def forward(self, student, teacher, targets) -> Dict[str, Tensor]:
        outputs, targeted = self.predictions(student, teacher), teacher.dense
        assignment = student.dense.assignment(targets)
        counted = assignment.valid if self.form.masked else 1
        normalizer = self.form.normalizer(assignment)
        losses = {}
        if self.wants("cls"):
            loss = self.class_loss(outputs.pop("logits"), targeted.logits)
            losses["cls"] = loss * counted / normalizer
        if self.wants("bbox"):
            loss = self.box_loss(outputs.pop("deltas"), self.coder(student, teacher), targeted)
            weight = self.confidence(targeted.logits) * counted
            divisor = weight.sum().clamp(min=EPS) if self.form.box_mean else normalizer
            losses["bbox"] = loss * weight / divisor
        if self.wants("centerness"):
            loss = self.centerness_loss(outputs.pop("centerness"), targeted.centerness)
            losses["centerness"] = loss * assignment.positive / normalizer
        return {name: _sum_levels(loss, assignment.sizes) for name, loss in losses.items()}

    def class_loss(self, logits: List[Tensor], teacher_logits: List[Tensor]) -> Tensor:
        """L maps (N, A·K, h, w) of both -> (N, R), summed over classes."""
        return _flatten(
            [
                quality_focal_kd(x, z, self.beta).unflatten(1, (self.num_anchors, -1)).sum(dim=2)
                for x, z in zip(logits, teacher_logits)
            ]
        )

    def confidence(self, logits: List[Tensor]) -> Tensor:
        """L maps (N, A·K, h, w) -> (N, R), the highest class probability of each anchor."""
        highest = [x.detach().unflatten(1, (self.num_anchors, -1)).amax(dim=2) for x in logits]
        return _flatten(highest).float().sigmoid()

    def box_loss(self, deltas: List[Tensor], coder, teacher) -> Tensor:
        """
        Args:
            deltas: L maps (N, A·D, h, w), D numbers per box.
            coder, teacher: the dense heads, in their views, that decode the deltas and that give
                the target.

        Returns:
            (N, R).
        """
        if self.form.box_loss != "kl":
            iou, giou = paired_iou(coder.decode(deltas), teacher.decode(teacher.deltas))
            return IOU_LOSSES[self.form.box_loss](iou, giou)
        sides = (self.num_anchors, 4, -1)
        return _flatten(
            [
                localization_kd(
                    x.unflatten(1, sides), z.unflatten(1, sides), self.temperature, dim=3
                ).mean(dim=2)
                for x, z in zip(deltas, teacher.deltas)
            ]
        )

    def centerness_loss(self, logits: List[Tensor], teacher_logits: List[Tensor]) -> Tensor:
        """L maps (N, A, h, w) of both -> (N, R)."""
        return F.binary_cross_entropy_with_logits(
            _flatten(logits).float(), _flatten(teacher_logits).float().sigmoid(), reduction="none"
        )


def _sum_levels(loss: Tensor, sizes: List[int]) -> Tensor:
    """(N, R) -> (L,)."""
    return torch.stack([x.sum() for x in loss.split(sizes, dim=1)])


def _loss_form(student: Family, box_loss: str, key: str) -> LossForm:
    form = LOSS_FORMS.get(student.architecture)
    if form is None:
        raise UserError(
            f"MODEL.META_ARCHITECTURE is '{student.name}', for which no comparison of predictions "
            f"is known: known are {', '.join(LOSS_FORMS)}"
        )
    if not box_loss:
        return form
    if box_loss not in BOX_LOSSES:
        raise UserError(f"{key} is '{box_loss}': {nearest(box_loss, BOX_LOSSES)}")
    if box_loss == "kl" and student.dense_head.box_dim == 4:
        raise UserError(
            f"{key} is 'kl', which compares distributions, but {student.name} predicts 4 numbers "
            "per box: give 'giou' or 'iou'"
        )
    return form._replace(box_loss=box_loss)


def _check_same_head(student: Family, teacher: Family, key: str) -> None:
    """Refuses a pair whose predictions do not stand for the same anchors, classes and bins."""
    node = f"MODEL.{student.architecture.upper()}"
    facts = (
        ("MODEL.META_ARCHITECTURE", "kind of detector", lambda f: f.architecture),
        (f"{node}.IN_FEATURES", "strides of the levels", lambda f: [x.stride for x in f.levels]),
        (f"{node}.NUM_CLASSES", "number of classes", lambda f: f.num_classes),
        ("MODEL.ANCHOR_GENERATOR", "anchors per location", lambda f: f.dense_head.num_anchors),
        (f"{node}.REG_MAX", "highest bin per box side", lambda f: f.dense_head.box_dim // 4 - 1),
    )
    for config_key, what, of in facts:
        ours, theirs = of(student), of(teacher)
        if ours != theirs:
            raise UserError(
                f"{key} compares predictions one by one: the {what} is {ours} of the student "
                f"({config_key}) and {theirs} of the teacher (DISTILL.TEACHER.CONFIG); take a "
                "teacher that has the same"
            )

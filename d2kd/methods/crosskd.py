"""CrossKD: Cross-Head Knowledge Distillation for Object Detection (Wang et al., CVPR 2024,
https://arxiv.org/abs/2306.11369).

Features of the student's towers are handed over to the rest of the teacher's towers. What these
predict learns from the teacher's own predictions, while the student's predictions learn from ground
truth alone. Follows the authors' released code, which differs from the paper in the alignment of
statistics (not in the paper) and in weights.

Shapes: N images, C channels, (h, w) the size of an FPN level.
"""

from functools import partial
from typing import Dict, Iterator, List, Mapping, Tuple

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from d2kd.errors import UserError
from d2kd.methods.dense_kd import DenseKD, localization_kd, quality_focal_kd
from d2kd.methods.distiller import DISTILLER_REGISTRY, Needs
from d2kd.modeling.channel_statistics import channel_statistics, transfer_statistics
from d2kd.modeling.families import BRANCHES, Family

__all__ = ["CrossKD", "align_statistics", "localization_kd", "quality_focal_kd"]

# An almost dead channel of the student is stretched by no more than this, and so is its gradient;
# the authors' code stretches up to a millionfold. Channels that are alive stay far below.
MAX_GAIN = 1e3


def align_statistics(student: Tensor, teacher: Tensor) -> Tensor:
    """Gives every channel of the student the teacher's mean and standard deviation over the batch.

    Args:
        student: (N, C, h, w); the gradient goes through its mean and standard deviation.
        teacher: (N, C, h, w), of which only the statistics matter; gets no gradient.

    Returns:
        (N, C, h, w), at least float32: (s - μ_s) / (σ_s + ε) · σ_t + μ_t.
    """
    return transfer_statistics(student, *channel_statistics(teacher), max_gain=MAX_GAIN)


@DISTILLER_REGISTRY.register()
class CrossKD(DenseKD):
    """Student features through the rest of the teacher's head, towards the teacher's predictions.

    Neither the student's blocks after the hand-over nor its prediction convs get a gradient.
    """

    requires = {
        "cls": Needs(student=("tower", "assignment"), teacher=("dense", "tower_statistics")),
        "bbox": Needs(student=("tower", "assignment"), teacher=("dense", "tower_statistics")),
        "centerness": Needs(student=("tower", "assignment"), teacher=("dense", "tower_statistics")),
    }

    @configurable
    def __init__(
        self,
        *,
        tap: int = 3,
        pre_activation: bool = False,
        widths: Mapping[str, Tuple[int, int]],
        **kwargs,
    ):
        """
        Args:
            tap: k, how many blocks of the student's towers run before the hand-over.
            pre_activation: hand over, and align, what block k gives before its activation. (What
                the authors' code says; in-place operations make it do the other.)
            widths: (student, teacher) channels of the handed-over features by branch; where they
                differ, a trained 1×1 convolution maps one to the other.
            kwargs: see :class:`DenseKD`.
        """
        super().__init__(**kwargs)
        self.tap = tap
        self.pre_activation = pre_activation
        self.adapters = nn.ModuleDict(
            {b: nn.Conv2d(c_s, c_t, 1) for b, (c_s, c_t) in widths.items() if c_s != c_t}
        )
        # Of the towers, only the output of one block is read.
        block = f".{tap}.pre" if pre_activation else f".{tap}"
        self.requires = {
            term: Needs(
                *[tuple(n + block if n.startswith("tower") else n for n in side) for side in needs]
            )
            for term, needs in self.requires.items()
        }

    @classmethod
    def default_config(cls) -> CfgNode:
        node = super().default_config()
        # Blocks of the student's towers before the hand-over; 0 = the FPN levels are handed over.
        # The authors take 2 for FCOS and 3 for the others, of 4
        node.TAP = 3
        # Hand over before the activation of the last of these blocks instead of after it
        node.PRE_ACTIVATION = False
        return node

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        node = cls.node(cfg)
        kwargs = super().from_config(cfg, student, teacher)
        for who, family in (("student", student), ("teacher", teacher)):
            blocks = min(family.dense_head.num_blocks(b) for b in BRANCHES)
            if not 0 <= node.TAP <= blocks:
                raise UserError(
                    f"DISTILL.CROSSKD.TAP is {node.TAP}, but the towers of the {who} have {blocks} "
                    f"blocks: give 0 ... {blocks}"
                )
        return {
            **kwargs,
            "tap": node.TAP,
            "pre_activation": node.PRE_ACTIVATION,
            "widths": {
                branch: tuple(f.dense_head.channels(branch, node.TAP) for f in (student, teacher))
                for branch in _branches(kwargs["terms"])
            },
        }

    def predictions(self, student, teacher) -> Dict[str, List[Tensor]]:
        outputs = {}
        for branch in _branches([t for t in self.terms if self.wants(t)]):
            features = self.hand_over(branch, student.dense, teacher.dense)
            outputs.update(teacher.dense.resume(branch, self.tap, features))
        return outputs

    def hand_over(self, branch: str, student, teacher) -> Iterator[Tensor]:
        """What of the student goes into the rest of the teacher's tower, level by level; each is
        made when it is read, for nobody else needs it."""
        features = student.tower(branch, self.tap, self.pre_activation)
        if branch in self.adapters:
            features = [self.adapters[branch](x) for x in features]
        statistics = teacher.tower_statistics(branch, self.tap, self.pre_activation)
        align = partial(transfer_statistics, max_gain=MAX_GAIN, relu=self.tap > 0)
        return map(align, features, *zip(*statistics))

    def coder(self, student, teacher):
        return teacher.dense


def _branches(terms) -> List[str]:
    """The branches whose predictions the terms compare; either may have the centerness."""
    return [b for b in BRANCHES if b in terms or "centerness" in terms]

"""CrossKD: Cross-Head Knowledge Distillation for Object Detection (Wang et al., CVPR 2024,
https://arxiv.org/abs/2306.11369).

Features of the student's towers are handed over to the rest of the teacher's towers. What these
predict learns from the teacher's own predictions, while the student's predictions learn from ground
truth alone. Follows the authors' released code, which by second-hand notes differs from the paper
in the alignment of statistics (not in the paper) and in weights.

Shapes: N images, C channels, (h, w) the size of an FPN level.
"""

from dataclasses import replace
from functools import partial
from typing import Dict, Iterable, Iterator, List, Mapping, Tuple

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from d2kd.layers import (
    MAX_GAIN,
    channel_statistics,
    kl_divergence,
    quality_focal_kd,
    transfer_statistics,
)
from d2kd.methods.core import DISTILLER_REGISTRY, Defaults
from d2kd.methods.core.dense_kd import OUTPUTS, TARGETS, DenseKD
from d2kd.schema import Key
from d2kd.views import (
    Assignment,
    Family,
    Reads,
    StudentView,
    TeacherView,
    Tower,
    View,
)
from d2kd.views.families import BRANCHES

__all__ = ["CrossKD", "align_statistics", "localization_kd", "quality_focal_kd"]

# Of two distributions of a box side's distance, over R bins: (M, R) twice -> (M,)
localization_kd = kl_divergence


# After how many of 4 blocks the authors hand over, by the kind of student
_DEPTH_OF = {"RetinaNet": 3, "ATSS": 3, "GFL": 3, "PaperFCOS": 2, "FCOS": 2}


def align_statistics(student: Tensor, teacher: Tensor) -> Tensor:
    """Gives every channel of the student the teacher's mean and standard deviation over the batch,
    as the authors' code does. The method stretches a channel by :data:`MAX_GAIN` at most.

    Args:
        student: (N, C, h, w); the gradient goes through its mean and standard deviation.
        teacher: (N, C, h, w), of which only the statistics matter; gets no gradient.

    Returns:
        (N, C, h, w), at least float32: (s - μ_s) / (σ_s + ε) · σ_t + μ_t.
    """
    return transfer_statistics(student, *channel_statistics(teacher))


@DISTILLER_REGISTRY.register()
class CrossKD(DenseKD):
    """Student features through the rest of the teacher's head, towards the teacher's predictions.

    Neither the student's blocks after the hand-over nor its prediction convs get a gradient.
    """

    keys = {
        **DenseKD.keys,
        "DEPTH": Key(
            3,
            "Blocks of the student's towers before the hand-over; 0 = the FPN levels are handed "
            "over. The authors take 2 for FCOS and 3 for the others, of 4",
            low=0,
        ),
        "PRE_ACTIVATION": Key(
            False, "Hand over before the activation of the last of these blocks instead of after it"
        ),
    }

    defaults_of = {
        kind: Defaults({**values, "DEPTH": _DEPTH_OF[kind]}, source)
        for kind, (values, source) in DenseKD.defaults_of.items()
    }

    @configurable
    def __init__(
        self,
        *,
        branches: Mapping[str, str],
        depth: int,
        pre_activation: bool,
        widths: Mapping[str, Tuple[int, int]],
        **kwargs,
    ):
        """
        Args:
            branches: the branch of the head, "cls" or "bbox", that each term's predictions come
                from.
            depth: how many blocks of the student's towers run before the hand-over.
            pre_activation: hand over, and align, what the last of these blocks gives before its
                activation. (What the authors' code says; in-place operations make it do the other.)
            widths: (student, teacher) channels of the handed-over features by branch; where they
                differ, a trained 1×1 convolution maps one to the other.
            kwargs: see :class:`DenseKD`.
        """
        super().__init__(**kwargs)
        self.branches = dict(branches)
        self.depth = depth
        self.tower_reads = {b: _tower_reads(b, depth, pre_activation) for b in branches.values()}
        self.adapters = nn.ModuleDict(
            {b: nn.Conv2d(c_s, c_t, 1) for b, (c_s, c_t) in widths.items() if c_s != c_t}
        )

    @classmethod
    def reads(cls, node: CfgNode, student: Family, teacher: Family) -> Dict[str, Reads]:
        reads = {}
        for name, branch in cls._branches(node, teacher).items():
            tower, statistics = _tower_reads(branch, node.DEPTH, node.PRE_ACTIVATION)
            ours, theirs = (tower, Assignment()), (TARGETS[name], statistics)
            reads[name] = Reads(ours, theirs, {Tower: "DEPTH"})
        return reads

    @classmethod
    def from_config(cls, cfg: CfgNode, student: Family, teacher: Family) -> Dict:
        branches = cls._branches(cfg, teacher)
        return {
            **super().from_config(cfg, student, teacher),
            "branches": branches,
            "depth": cfg.DEPTH,
            "pre_activation": cfg.PRE_ACTIVATION,
            "widths": {
                branch: tuple(f.dense_head.channels(branch, cfg.DEPTH) for f in (student, teacher))
                for branch in _distinct(branches.values())
            },
        }

    @classmethod
    def _branches(cls, node: CfgNode, teacher: Family) -> Dict[str, str]:
        known = teacher.dense_head.branch_of if teacher.dense_head else {}
        return {name: known.get(OUTPUTS[name], "cls") for name in cls.enabled_terms(node)}

    def predictions(self, student: StudentView, teacher: TeacherView) -> Dict[str, List[Tensor]]:
        outputs = {}
        for branch in _distinct(b for name, b in self.branches.items() if self.wants(name)):
            features = self.hand_over(branch, student, teacher)
            outputs.update(teacher.resume(branch, self.depth, features))
        return outputs

    def hand_over(
        self, branch: str, student: StudentView, teacher: TeacherView
    ) -> Iterator[Tensor]:
        """What of the student goes into the rest of the teacher's tower, level by level; each is
        made when it is read, for nobody else needs it."""
        ours, theirs = self.tower_reads[branch]
        features = student.tower(ours)
        if branch in self.adapters:
            features = [self.adapters[branch](x) for x in features]
        align = partial(transfer_statistics, max_gain=MAX_GAIN, relu=self.depth > 0)
        return map(align, features, *zip(*teacher.tower_statistics(theirs)))

    def box_decoder(self, student: StudentView, teacher: TeacherView) -> View:
        return teacher


def _tower_reads(branch: str, depth: int, pre_activation: bool) -> Tuple[Tower, Tower]:
    """What of the student's tower is handed over, and what of the teacher's it is aligned with."""
    tower = Tower(branch, depth, pre_activation and depth > 0)
    return tower, replace(tower, statistics=True)


def _distinct(branches: Iterable[str]) -> List[str]:
    """Each branch once, in the order of :data:`BRANCHES`."""
    given = set(branches)
    return [branch for branch in BRANCHES if branch in given]

"""Family adapters: how detectors of one kind are built. Nothing else knows their modules' names."""

from typing import Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Tuple

from detectron2.utils.registry import Registry
from torch import nn

from d2kd.errors import UserError, nearest

from .dense_head import DenseHead
from .residual import residual_sums

FAMILY_REGISTRY = Registry("FAMILY")
FAMILY_REGISTRY.__doc__ = """
Registry of family adapters, subclasses of :class:`Family`. A detector belongs to the family that
lists its class, or the nearest of its base classes, in ``architectures``. A meta-architecture from
elsewhere joins by registering a subclass here.
"""


class Level(NamedTuple):
    """One FPN level."""

    name: str
    stride: int
    channels: int


class Family:
    """What is fixed about one detector: its levels, its head, and the modules to observe.

    Attributes:
        architectures: names of the meta-architectures of this family.
        offers: what a view of such a detector can be asked for, out of "stages", "features",
            "dense", "tower", "tower_statistics", "assignment" (what anchors learn), "proposals",
            "rois".
        detector: the detector itself.
        dense_head: its dense head; the RPN of a two-stage detector.
        num_classes: how many classes it detects.
        levels: the FPN levels that the dense head reads, finest first.
    """

    architectures: Tuple[str, ...] = ()
    offers: FrozenSet[str] = frozenset()

    def __init__(self, detector: nn.Module):
        self.detector = detector
        self.dense_head: DenseHead = self.build_dense_head()
        shapes = detector.backbone.output_shape()
        self.levels: List[Level] = [
            Level(name, shapes[name].stride, shapes[name].channels) for name in self.level_names()
        ]

    def build_dense_head(self) -> DenseHead:
        raise NotImplementedError(f"{type(self).__name__} must describe the dense head")

    def level_names(self) -> List[str]:
        """Names of the backbone outputs that the dense head reads, finest first."""
        raise NotImplementedError(f"{type(self).__name__} must name the levels")

    @property
    def name(self) -> str:
        """The detector's class name, for messages."""
        return type(self.detector).__name__

    @property
    def architecture(self) -> str:
        """Which of :attr:`architectures` the detector is, or is derived from."""
        bases = [base.__name__ for base in type(self.detector).__mro__]
        return next(name for name in bases if name in self.architectures)

    @property
    def num_classes(self) -> int:
        return self.dense_head.num_classes

    @property
    def stages(self) -> List[Level]:
        """The backbone stages that a view can give, finest first."""
        shapes = self.stage_module.output_shape()
        return [Level(name, shape.stride, shape.channels) for name, shape in shapes.items()]

    @property
    def stages_before_relu(self) -> FrozenSet[str]:
        """The stages that a view can also give before their last ReLU, by name."""
        return frozenset(residual_sums(self.stage_module))

    @property
    def stage_module(self) -> nn.Module:
        """The part of the backbone below the FPN."""
        return getattr(self.detector.backbone, "bottom_up", self.detector.backbone)

    def is_trained(self, name: str) -> bool:
        """Whether the gradient at a backbone stage or an FPN level reaches any parameter: one of
        this stage or, in a backbone whose modules are named after stages, of one before it."""
        backbone = self.stage_module
        parts = dict(backbone.named_children())
        if name in parts:
            before = list(parts)[: list(parts).index(name) + 1]
            parts = {part: parts[part] for part in before}
        elif name not in backbone.output_shape():
            parts = {"backbone": self.detector.backbone}  # an FPN level
        return any(p.requires_grad for part in parts.values() for p in part.parameters())

    def taps(self, needs: FrozenSet[str]) -> Dict[str, nn.Module]:
        """The modules to observe so that a view can answer for ``needs``.

        Args:
            needs: a subset of :attr:`offers`; "tower.3" for the towers after block 3 alone,
                "tower.3.pre" before its activation, the same for "tower_statistics";
                "stages.res3.pre" for one of :attr:`stages_before_relu`.

        Returns:
            modules by the name under which the view looks their outputs up.
        """
        backbone = self.detector.backbone
        taps = {"backbone": backbone}
        if "stages" in needs:
            taps["stages"] = self.stage_module
        for name, module in residual_sums(self.stage_module).items():
            if f"stages.{name}.pre" in needs:
                taps[f"stages.{name}.pre"] = module
        if "dense" in needs:
            taps["head"] = self.dense_head.module
        for name, module in self.dense_head.tower_taps().items():
            block = name.split(".", 1)[1]
            if needs & {"tower", f"tower.{block}"}:
                taps[name] = module
            if needs & {"tower_statistics", f"tower_statistics.{block}"}:
                taps[f"{name}.statistics"] = module
        return taps


def build_family(detector: nn.Module) -> Family:
    """The family adapter of a detector.

    Raises:
        UserError: if its meta-architecture belongs to no registered family.
    """
    families = [family for _, family in FAMILY_REGISTRY]
    for base in type(detector).__mro__:
        for family in families:
            if base.__name__ in family.architectures:
                return family(detector)
    known = sorted(name for family in families for name in family.architectures)
    raise UserError(
        f"MODEL.META_ARCHITECTURE '{type(detector).__name__}' cannot be distilled: known are "
        f"{', '.join(known)}; register a Family for it in FAMILY_REGISTRY"
    )


def paired_levels(
    student: Family, teacher: Family, key: Optional[str] = None
) -> List[Tuple[int, int]]:
    """Pairs the FPN levels of equal stride, finest first. Levels without a partner are left out.

    Args:
        student, teacher: the two families.
        key: config key to blame when nothing matches.

    Returns:
        (student index, teacher index) per pair.

    Raises:
        UserError: if no stride is common.
    """
    by_stride = {level.stride: j for j, level in enumerate(teacher.levels)}
    pairs = [
        (i, by_stride[level.stride])
        for i, level in enumerate(student.levels)
        if level.stride in by_stride
    ]
    if not pairs:
        raise UserError(
            f"{key}: no FPN level in common; strides of the student "
            f"{[level.stride for level in student.levels]}, of the teacher "
            f"{[level.stride for level in teacher.levels]}"
        )
    return pairs


def paired_stages(
    student: Family, teacher: Family, names: Sequence[str], key: str
) -> List[Tuple[Level, Level]]:
    """Pairs backbone stages of the student with those of the teacher that have the same stride.

    Args:
        student, teacher: the two families.
        names: the student's stages.
        key: config key that holds the names, for messages.

    Raises:
        UserError: if the student has no such stage, or the teacher none of its stride.
    """
    ours = {stage.name: stage for stage in student.stages}
    theirs = {stage.stride: stage for stage in teacher.stages}
    pairs = []
    for name in names:
        if name not in ours:
            raise UserError(f"{key} names '{name}': {nearest(name, ours)}")
        if ours[name].stride not in theirs:
            raise UserError(
                f"{key} names '{name}' of stride {ours[name].stride}, but the teacher's stages "
                f"have strides {sorted(theirs)}: leave it out"
            )
        pairs.append((ours[name], theirs[ours[name].stride]))
    return pairs

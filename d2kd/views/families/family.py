"""Families: how detectors of one kind are built. Nothing else knows their modules' names."""

from functools import cached_property
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple

from detectron2.modeling.box_regression import Box2BoxTransformRotated
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from d2kd.errors import UserError

from ..reads import (
    Assignment,
    CannotRead,
    Dense,
    Features,
    Proposals,
    Read,
    Regions,
    Stage,
    Tower,
)
from ..recorder import Observed, Recorder
from .assignment import AnchorTargets
from .box_head import BoxHead
from .dense_head import DenseHead
from .residual import ResidualSum, residual_sums

FAMILY_REGISTRY = Registry("FAMILY")
FAMILY_REGISTRY.__doc__ = """
Registry of families, subclasses of :class:`Family`. A detector belongs to the one registered last
whose ``accepts(detector)`` is true, so one from elsewhere comes before those of d2kd.
"""


class Level(NamedTuple):
    """One FPN level or backbone stage."""

    name: str
    stride: int  # pixels per cell
    channels: int
    index: int = 0  # its place among the detector's, finest first


class Pixels(NamedTuple):
    """What turns raw pixels into a detector's input."""

    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    size_divisibility: int  # images are padded to multiples of it; 0 = as they are
    padding_constraints: Optional[Dict] = None  # as in Detectron2's ``Backbone``


class Family:
    """What is fixed about one detector: its backbone, levels and heads, and where each thing that
    can be read of it is observed.

    A subclass says in :meth:`accepts` which detectors are its own, and sets or overrides what they
    have; everything is optional but a backbone with ``output_shape()``.

    Attributes:
        detector: the detector itself.
        dense_head: its dense head; the RPN of a two-stage detector; None if it has none.
        box_head: its second stage, or None.
    """

    def __init__(self, detector: nn.Module):
        self.detector = detector
        self.dense_head: Optional[DenseHead] = None
        self.box_head: Optional[BoxHead] = None

    @classmethod
    def accepts(cls, detector: nn.Module) -> bool:
        """Whether this family knows how the detector is built."""
        raise NotImplementedError(f"{cls.__name__} must say which detectors it accepts")

    @property
    def name(self) -> str:
        """The detector's class name, for messages."""
        return type(self.detector).__name__

    @property
    def num_classes(self) -> Optional[int]:
        """How many classes it detects, background excluded; None if it does not say. By default
        what Detectron2's detectors call so."""
        parts = (self.detector, getattr(self.detector, "roi_heads", None))
        counts = (getattr(part, "num_classes", None) for part in parts)
        return next((count for count in counts if isinstance(count, int)), None)

    @property
    def level_names(self) -> List[str]:
        """The backbone outputs that are FPN levels, finest first; empty if there is no FPN."""
        return []

    @property
    def backbone(self) -> nn.Module:
        """From a batch to FPN levels by name. The part below the FPN is :attr:`stage_module`."""
        return self.detector.backbone

    @property
    def stage_module(self) -> nn.Module:
        """From a batch to backbone stages by name; the backbone itself if there is no FPN."""
        # ViTDet's pyramid calls it "net".
        below = getattr(self.backbone, "bottom_up", getattr(self.backbone, "net", None))
        return self.backbone if below is None else below

    @cached_property
    def levels(self) -> List[Level]:
        """The FPN levels, finest first."""
        shapes = self.backbone.output_shape()
        return [
            Level(name, shapes[name].stride, shapes[name].channels, i)
            for i, name in enumerate(self.level_names)
        ]

    @cached_property
    def stages(self) -> List[Level]:
        """The backbone stages that can be read, finest first."""
        shapes = self.stage_module.output_shape()
        return [Level(n, s.stride, s.channels, i) for i, (n, s) in enumerate(shapes.items())]

    @property
    def not_distilled(self) -> List[str]:
        """Heads that are trained on ground truth alone, whatever the method, for the report."""
        return []

    @cached_property
    def pixels(self) -> Pixels:
        """How the detector wants its images."""
        return Pixels(
            tuple(self.detector.pixel_mean.flatten().tolist()),
            tuple(self.detector.pixel_std.flatten().tolist()),
            self.backbone.size_divisibility,
            getattr(self.backbone, "padding_constraints", None),
        )

    def preprocess(self, batched_inputs: List[Dict]) -> ImageList:
        """Raw pixels, in the detector's channel order, to its normalised and padded batch."""
        return self.detector.preprocess_image(batched_inputs)

    def is_trained(self, name: str) -> bool:
        """Whether the gradient at a backbone stage or an FPN level reaches any parameter: one of
        this stage or, in a backbone whose modules are named after stages, of one before it."""
        parts = dict(self.stage_module.named_children())
        if name in parts:
            before = list(parts)[: list(parts).index(name) + 1]
            parts = {part: parts[part] for part in before}
        elif name not in self.stage_module.output_shape():
            parts = {"backbone": self.backbone}  # an FPN level
        return any(p.requires_grad for part in parts.values() for p in part.parameters())

    # What anchors learn, of detectors that have some

    @property
    def has_assignment(self) -> bool:
        """Whether :meth:`anchors`, :meth:`decode` and :meth:`assign` are there."""
        return False

    @property
    def box_form(self) -> str:
        """What a box prediction is: "deltas" of an anchor box, "distances" of a point to the sides
        of its box, or a "distribution" of each of these distances; "" if it is unknown."""
        return ""

    @property
    def normalizer(self) -> str:
        """What the detector's own losses are divided by, as an attribute of
        :class:`AnchorTargets`; "" if it is unknown."""
        return ""

    @property
    def ignores_anchors(self) -> bool:
        """Whether some anchors learn nothing: those between positive and negative, and those
        outside of the image. Else all do, in the padding too."""
        return True

    @property
    def anchor_shapes(self) -> Tuple[Tuple[float, ...], ...]:
        """The anchors of one location of each level, x1 y1 x2 y2 around it, in pixels."""
        raise UserError(
            f"{type(self).__name__} does not define anchor_shapes, without which predictions of "
            f"{self.name} cannot be compared: define it (docs/adding-a-detector.md)"
        )

    def anchors(self, features: List[Tensor]) -> List[Boxes]:
        """The anchors, or boxes around the points, of levels of given sizes."""
        raise NotImplementedError(f"{type(self).__name__} has no anchors")

    def decode(self, deltas: List[Tensor], anchors: List[Boxes]) -> Tensor:
        """Raw box predictions per level to boxes (N, R, 4) in pixels."""
        raise NotImplementedError(f"{type(self).__name__} has no anchors")

    def assign(self, anchors: List[Boxes], targets: List[Instances]) -> AnchorTargets:
        """What anchors learn from the ground truth of a batch."""
        raise NotImplementedError(f"{type(self).__name__} has no anchors")

    def recorded_assignment(
        self, recorder: Recorder, anchors: List[Boxes], targets: List[Instances]
    ) -> AnchorTargets:
        """:meth:`assign`, as a detector computed it in an observed forward, where that can be seen.

        Args:
            recorder: of the modules to observe for an :class:`Assignment`.
            anchors, targets: as for :meth:`assign`, with which it is computed again elsewhere.
        """
        return self.assign(anchors, targets)

    # Where things are observed

    def observed(self, reads: Iterable[Read]) -> List[Observed]:
        """The modules to observe so that a view can answer for all of these."""
        return [Observed(self.backbone, inputs=True), *(o for r in reads for o in self.observe(r))]

    def observe(self, read: Read) -> List[Observed]:
        """The modules to observe beside the backbone so that a view can answer for a read.

        Raises:
            CannotRead: with the reason why this detector cannot give it.
        """
        observers = {
            Features: self._observe_features,
            Stage: self._observe_stage,
            Dense: self._observe_dense,
            Tower: self._observe_tower,
            Assignment: self._observe_assignment,
            Proposals: self._observe_proposals,
            Regions: self._observe_regions,
        }
        return observers[type(read)](read)

    def _observe_features(self, read: Features) -> List[Observed]:
        if not self.levels:
            raise CannotRead(f"{self.name} has no FPN")
        parts = dict(self.backbone.named_children())
        stages = [level.name for level in self.levels if level.name in parts]
        if stages:  # C4 and DC5 models
            names = ", ".join(stages)
            raise CannotRead(f"{self.name} has no FPN: its head reads {names} of the backbone")
        return []

    def _observe_stage(self, read: Stage) -> List[Observed]:
        names = [stage.name for stage in self.stages]
        if read.name not in names:
            raise CannotRead(f"the backbone of {self.name} has {', '.join(names)}")
        if not read.pre_activation:
            return [Observed(self.stage_module)]
        if read.name not in self.residual_sums:
            raise CannotRead(
                f"{read.name} of {self.name} ({type(self.stage_module).__name__}) does not end in "
                "a residual block of Detectron2's ResNets"
            )
        return [Observed(self.residual_sums[read.name])]

    @cached_property
    def residual_sums(self) -> Dict[str, ResidualSum]:
        """What to observe of the stages that can be read before their last activation."""
        return residual_sums(self.stage_module)

    def _observe_dense(self, read: Dense) -> List[Observed]:
        if self.dense_head is None:
            raise CannotRead(f"{self.name} has no dense head")
        for output in read.outputs:
            if output not in self.dense_head.outputs:
                raise CannotRead(f"{self.name} predicts no {output}")
        return [Observed(self.dense_head.module)]

    def _observe_tower(self, read: Tower) -> List[Observed]:
        if self.dense_head is None:
            raise CannotRead(f"{self.name} has no dense head")
        blocks = self.dense_head.num_blocks(read.branch)
        if not 0 <= read.depth <= blocks:
            raise CannotRead(f"the {read.branch} tower of {self.name} has {blocks} blocks")
        if read.depth == 0:
            return self._observe_features(Features())
        return [Observed(self.dense_head.block(read.branch, read.depth, read.pre_activation))]

    def _observe_assignment(self, read: Assignment) -> List[Observed]:
        if not self.has_assignment:
            raise CannotRead(f"{self.name} assigns no anchors to objects")
        return []

    def _observe_proposals(self, read: Proposals) -> List[Observed]:
        self._check_box_head(read.stage)
        head = [] if self.dense_head is None else [Observed(self.dense_head.module)]
        return [*head, *self.box_head.observe_proposals()]

    def check_proposes(self) -> None:
        """
        Raises:
            CannotRead: if a teacher of this family cannot be asked for proposals of its own, by
                ``propose(features, outputs, image_sizes)``.
        """
        if not hasattr(self, "propose"):
            raise CannotRead(f"{type(self).__name__} cannot make the proposals of {self.name} anew")

    def _observe_regions(self, read: Regions) -> List[Observed]:
        self._check_box_head(read.stage)
        if read.pre_activation and self.box_head.last_fc(read.stage) is None:
            raise CannotRead(f"the box head of {self.name} has no fully connected layer")
        return self.box_head.observe(read)

    def _check_box_head(self, stage: int) -> None:
        if self.box_head is None:
            raise CannotRead(f"{self.name} is not a two-stage detector with a box head on an FPN")
        if not 0 <= stage < self.box_head.num_stages:
            raise CannotRead(f"{self.name} has {self.box_head.num_stages} box head(s), from 0")


def find_family(detector: nn.Module) -> Optional[Family]:
    """The family of a detector: of those that accept it, the one registered last; None if none
    does."""
    families = [family for _, family in FAMILY_REGISTRY]
    found = next((family for family in reversed(families) if family.accepts(detector)), None)
    return found and found(detector)


def any_family(detector: nn.Module) -> Family:
    """The family of a detector; of one without, what is the same in all of Detectron2's: its name,
    backbone and pixels, though nothing of it can be distilled."""
    return find_family(detector) or Family(detector)


def build_family(detector: nn.Module) -> Family:
    """The family of a detector that has one.

    Raises:
        UserError: if none accepts it.
    """
    family = find_family(detector)
    if family is not None:
        return family
    families = [family for _, family in FAMILY_REGISTRY]
    raise UserError(
        f"MODEL.META_ARCHITECTURE '{type(detector).__name__}' cannot be distilled: accepted by "
        f"none of {', '.join(f.__name__ for f in families)}; register a Family for it in "
        "FAMILY_REGISTRY"
    )


def cell_shapes(anchor_generator: nn.Module) -> Tuple[Tuple[float, ...], ...]:
    """The anchors of the first location of each level, x1 y1 x2 y2 in pixels."""
    cells = list(anchor_generator.cell_anchors)
    if any(cell.is_meta for cell in cells):  # numbers are not there, only how many
        return tuple(tuple(cell.shape) for cell in cells)
    shifts = [anchor_generator.offset * stride for stride in anchor_generator.strides]
    return tuple(
        tuple(round(x + shift, 2) for x in cell.flatten().tolist())
        for cell, shift in zip(cells, shifts)
    )


def refuse_rotated(detector: nn.Module, box2box_transform: object) -> None:
    """
    Raises:
        UserError: if a detector predicts rotated boxes: masks, overlaps and poolers are of upright
            ones.
    """
    if isinstance(box2box_transform, Box2BoxTransformRotated):
        raise UserError(
            f"MODEL.META_ARCHITECTURE '{type(detector).__name__}' with rotated boxes "
            "(MODEL.ANCHOR_GENERATOR, MODEL.PROPOSAL_GENERATOR) cannot be distilled: take upright "
            "boxes"
        )

"""Regions: the boxes of a batch on which two detectors are compared, and what a box head makes of
them.

Shapes: R regions of all images, C channels, (r, r) a pooled region, D numbers per hidden vector,
K classes.
"""

from functools import cached_property
from itertools import accumulate
from typing import List, NamedTuple, Optional, Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from .reads import Regions


class RegionSet:
    """Boxes of a batch. Some of them, :meth:`where`, know the set that they were chosen from, so
    that nothing runs again on what a box head has seen.

    Attributes:
        boxes: per image, in pixels of the padded batch.
        classes: per image, of each box; K = background.
        anchors: per image, which of a dense student's anchors predicted each box; or None.
        parent: the set that these regions are some of; None for a set of its own.
        rows: (R,), the places of these among the parent's regions.
        valid: (R,) bool, others only fill up: no loss may depend on them. None = all are.
    """

    def __init__(
        self,
        boxes: Sequence[Boxes],
        classes: Sequence[Tensor],
        anchors: Optional[Sequence[Tensor]] = None,
        parent: Optional["RegionSet"] = None,
        rows: Optional[Tensor] = None,
        valid: Optional[Tensor] = None,
    ):
        self.boxes: List[Boxes] = list(boxes)
        self.classes: List[Tensor] = list(classes)
        self.anchors = None if anchors is None else list(anchors)
        self.parent = parent
        self.rows = rows
        self.valid = valid

    @classmethod
    def from_proposals(cls, proposals: Sequence[Instances]) -> "RegionSet":
        """
        Args:
            proposals: per image, with ``proposal_boxes`` and ``gt_classes``.
        """
        return cls([p.proposal_boxes for p in proposals], [p.gt_classes for p in proposals])

    @cached_property
    def rois(self) -> Tensor:
        """(R, 5), each box after the number of its image, as Detectron2's ``ROIAlign`` takes it."""
        return torch.cat([F.pad(b.tensor, (1, 0), value=i) for i, b in enumerate(self.boxes)])

    def mean(self, values: Tensor) -> Tensor:
        """(R,) -> the mean over valid regions, a scalar; 0 without any."""
        if self.valid is None:
            return values.sum() / max(len(values), 1)
        return (values * self.valid).sum() / self.valid.sum().clamp(min=1)

    def where(self, kept: Sequence[Tensor]) -> "RegionSet":
        """Some of the regions.

        Args:
            kept: per image, a bool for every region.
        """
        # The host waits here, once per image, and not for every tensor that is indexed
        chosen = [k.nonzero()[:, 0] for k in kept]
        anchors = self.anchors and [a[i] for a, i in zip(self.anchors, chosen)]
        boxes = [b[i] for b, i in zip(self.boxes, chosen)]
        classes = [c[i] for c, i in zip(self.classes, chosen)]
        starts = accumulate(map(len, self.boxes), initial=0)
        rows = torch.cat([start + i for start, i in zip(starts, chosen)])
        valid = None if self.valid is None else self.valid[rows]
        return RegionSet(boxes, classes, anchors, self, rows, valid)


class RegionOutputs(NamedTuple):
    """What a box head makes of R regions, in the order of images and boxes; None where it was not
    asked."""

    pooled: Optional[Tensor] = None  # (R, C, r, r), RoI features
    hidden: Optional[Tensor] = None  # (R, D), the box head's output, which the predictor reads
    logits: Optional[Tensor] = None  # (R, K + 1), background last
    deltas: Optional[Tensor] = None  # (R, 4 K), or (R, 4) if class-agnostic
    pre_activation: Optional[Tensor] = None  # (R, D), hidden before the last activation

    def of_rows(self, rows: Tensor) -> "RegionOutputs":
        """The same of some regions."""
        return RegionOutputs(*[x if x is None else x[rows] for x in self])

    def answers(self, read: Regions) -> bool:
        """Whether all that is asked is there."""
        asked = {
            "pooled": read.pooled,
            "hidden": read.hidden,
            "logits": read.predictions,
            "pre_activation": read.pre_activation,
        }
        return all(getattr(self, name) is not None for name, wanted in asked.items() if wanted)

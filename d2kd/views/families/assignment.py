"""What the anchors of a dense detector learn on one batch.

Shapes: N images, R anchors of all levels (finest level first, then row, column, anchor), K classes.
"""

from functools import cached_property
from typing import List

from torch import Tensor

from d2kd.layers import centerness_targets, mean_over_gpus


class AnchorTargets:
    """The outcome of the detector's own assignment rule. Nothing here has a gradient.

    Attributes:
        sizes: number of anchors of each level, sums to R.
        labels: (N, R) in {-1, 0, ..., K}: K is background; -1 ignored, or outside the image.
        positive: (N, R) bool, anchors that learn an object.
    """

    def __init__(
        self, sizes: List[int], centers: Tensor, labels: Tensor, boxes: Tensor, num_classes: int
    ):
        """
        Args:
            sizes, labels: see the class.
            centers: (R, 2) of the anchors, (x, y) in pixels.
            boxes: (N, R, 4) the box that each positive anchor learns; others are not read.
            num_classes: K.
        """
        self.sizes = sizes
        self.labels = labels
        self.positive = (labels >= 0) & (labels < num_classes)
        self._centers, self._boxes = centers, boxes

    @cached_property
    def centerness(self) -> Tensor:
        """(N, R), in [0, 1]: the centerness that positive anchors learn, 0 for others."""
        return centerness_targets(self._centers, self._boxes, self.positive)

    @cached_property
    def valid(self) -> Tensor:
        """(N, R) bool, anchors that are neither ignored nor outside the image."""
        return self.labels >= 0

    @cached_property
    def num_positive(self) -> Tensor:
        """Positive anchors of this GPU's batch; every image counts as one at least."""
        return self.positive.sum(dim=1).clamp(min=1).sum().float()

    @cached_property
    def mean_num_positive(self) -> Tensor:
        """:attr:`num_positive` averaged over GPUs, with one communication."""
        return mean_over_gpus(self.num_positive)

    @cached_property
    def mean_sum_centerness(self) -> Tensor:
        """Sum of the centerness averaged over GPUs, with one communication; at least 1."""
        return mean_over_gpus(self.centerness.sum()).clamp(min=1)

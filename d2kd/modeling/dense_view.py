"""What a distiller may read of a dense head on one batch.

Shapes: N images, C channels, (h, w) the size of an FPN level, R anchors of all levels.
"""

import weakref
from functools import cached_property
from typing import Dict, Iterable, List, Optional, Tuple

from detectron2.structures import Boxes, Instances
from torch import Tensor

from .channel_statistics import channel_statistics
from .families import Assignment, DensePredictions
from .frozen import FrozenLayers


class Dense:
    """A dense head on one batch: its raw predictions, its towers, the rest of a tower, its anchors
    and what they learn. Everything is computed once, at the first reading."""

    def __init__(self, view):
        """
        Args:
            view: the :class:`~d2kd.modeling.views.View` of this detector.
        """
        # The view owns this object; were it the other way round too, all that the view holds would
        # stay in memory until Python looks for cycles, many steps later.
        self._view = weakref.proxy(view)
        self._assignment: Optional[Assignment] = None

    @cached_property
    def predictions(self) -> DensePredictions:
        """Raw predictions per level."""
        outputs = self._view.family.dense_head.predictions(self._view.calls("head")[0][1])
        return DensePredictions(*[levels and self._view.fit(levels) for levels in outputs])

    @property
    def logits(self) -> List[Tensor]:
        return self.predictions.logits

    @property
    def deltas(self) -> List[Tensor]:
        return self.predictions.deltas

    @property
    def centerness(self) -> Optional[List[Tensor]]:
        return self.predictions.centerness

    def tower(self, branch: str, k: int, pre_activation: bool = False) -> List[Tensor]:
        """Tower features after k blocks (conv, norm, activation), per level.

        Args:
            branch: "cls" or "bbox".
            k: number of blocks; 0 gives the FPN levels themselves.
            pre_activation: leave out the activation of the last of these blocks.
        """
        if k == 0:
            return list(self._view.features.values())
        calls = self._view.calls(_tower_tap(branch, k, pre_activation))
        return self._view.fit([output for _, output in calls])

    def tower_statistics(
        self, branch: str, k: int, pre_activation: bool = False
    ) -> List[Tuple[Tensor, Tensor]]:
        """Mean and standard deviation of the channels of :meth:`tower`, (1, C, 1, 1) each, per
        level; of the teacher only. Whoever needs no more saves the memory of the towers."""
        if k == 0:
            return [channel_statistics(x) for x in self._view.features.values()]
        calls = self._view.calls(_tower_tap(branch, k, pre_activation) + ".statistics")
        return [statistics for _, statistics in calls]

    def resume(self, branch: str, k: int, features: Iterable[Tensor]) -> Dict[str, List[Tensor]]:
        """Runs the rest of *this* detector's branch on other features, with gradient to them.
        See :meth:`~d2kd.modeling.families.TowerHead.resume`."""
        with self._view.precision(), FrozenLayers():
            return self._view.family.dense_head.resume(branch, k, features)

    @cached_property
    def anchors(self) -> List[Boxes]:
        """Anchors of each level, in pixels."""
        return self._view.family.anchors(list(self._view.features.values()))

    def decode(self, deltas: List[Tensor]) -> Tensor:
        """Boxes (N, R, 4) in pixels, as *this* detector understands raw box predictions.

        Args:
            deltas: per level, as in :class:`~d2kd.modeling.families.DensePredictions`.
        """
        return self._view.family.decode(deltas, self.anchors)

    def assignment(self, targets: List[Instances]) -> Assignment:
        """What this detector's anchors learn from the ground truth of the batch."""
        if self._assignment is None:
            self._assignment = self._view.family.assign(self.anchors, targets)
        return self._assignment


def _tower_tap(branch: str, k: int, pre_activation: bool) -> str:
    return f"{branch}.{k}.pre" if pre_activation else f"{branch}.{k}"

"""Views: what a distiller may read of one detector on one batch.

The student's view is recorded from its one training forward, the teacher's from the parts of it
that are asked for. Both are data; three functions take input of their own: :meth:`View.resume`,
:meth:`View.decode` and :meth:`View.regions`.

Shapes: N images, (H, W) the padded batch, C channels, (h, w) the size of an FPN level, R anchors of
all levels.
"""

import contextlib
from functools import cached_property
from typing import Callable, Dict, FrozenSet, Iterable, List, Optional, Tuple

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from d2kd.layers import FrozenLayers, channel_statistics

from .families import AnchorTargets, DensePredictions, Family
from .reads import Assignment, Dense, Features, Proposals, Read, Regions, Stage, Tower
from .recorder import Recorder
from .regions import RegionOutputs, RegionSet

Statistics = Tuple[Tensor, Tensor]  # mean and standard deviation, (1, C, 1, 1) each


class View:
    """One detector on one batch.

    Attributes:
        family: of the detector.
        reads: what can be read.
    """

    def __init__(self, family: Family, reads: Iterable[Read], recorder: Recorder):
        """
        Args:
            family: of the detector.
            reads: what the methods declared; nothing else can be read.
            recorder: which observed the detector on the batch.
        """
        self.family = family
        self.reads: FrozenSet[Read] = frozenset(reads)
        self._recorder = recorder
        self._outputs: Dict[Tuple[RegionSet, int], RegionOutputs] = {}

    def crop_to_student(self, x: Tensor, stride: int) -> Tensor:
        """Leaves out what of a map is padding that the student's batch does not have."""
        return x

    def precision(self) -> contextlib.AbstractContextManager:
        """The autocast context in which this detector runs."""
        return contextlib.nullcontext()

    @property
    def features(self) -> Dict[str, Tensor]:
        """FPN levels by name, finest first, (N, C, H / stride, W / stride)."""
        self._check(Features())
        return self.levels

    @cached_property
    def levels(self) -> Dict[str, Tensor]:
        """:attr:`features` for d2kd itself, which needs no declaration; empty without an FPN."""
        outputs = self._backbone_outputs
        return {x.name: self.crop_to_student(outputs[x.name], x.stride) for x in self.family.levels}

    def stage(self, read: Stage) -> Tensor:
        """A backbone stage, (N, C, H / stride, W / stride)."""
        self._check(read)
        if read.pre_activation:
            x = self._recorder.output(self.family.residual_sums[read.name])
        else:
            x = self._recorder.output(self.family.stage_module)[read.name]
        stride = next(stage.stride for stage in self.family.stages if stage.name == read.name)
        return self.crop_to_student(x, stride)

    @cached_property
    def predictions(self) -> DensePredictions:
        """Raw predictions of the dense head (of a two-stage detector: its RPN); None for those that
        no method declared."""
        declared = {name for read in self.reads if isinstance(read, Dense) for name in read.outputs}
        if not declared:
            self._check(Dense())
        outputs = self._dense_outputs()
        return DensePredictions(**{name: self._crop_levels(outputs[name]) for name in declared})

    def _dense_outputs(self) -> Dict[str, Optional[List[Tensor]]]:
        head = self.family.dense_head
        return head.predictions(self._recorder.output(head.module))._asdict()

    def tower(self, read: Tower) -> List[Tensor]:
        """Tower features per level, (N, C, h, w)."""
        self._check(read)
        if read.depth == 0:
            return list(self.levels.values())
        return self._crop_levels([call.output for call in self._recorder.calls(self.block(read))])

    def tower_statistics(self, read: Tower) -> List[Statistics]:
        """Statistics of the channels of :meth:`tower`, per level."""
        return [channel_statistics(x) for x in self.tower(read)]

    @property
    def assignment(self) -> AnchorTargets:
        """What this detector's anchors learn from the ground truth of the batch."""
        raise NotImplementedError("the assignment is read of the student")

    def proposals(self, read: Proposals) -> RegionSet:
        """The sampled, labelled proposals that one box head is trained on."""
        raise NotImplementedError(f"{type(self).__name__} must give proposals")

    def resume(
        self, branch: str, depth: int, features: Iterable[Tensor]
    ) -> Dict[str, List[Tensor]]:
        """Runs the rest of *this* detector's branch on other features, with gradient to them. It
        runs as the student does, also if a teacher is in float16: nobody scales gradients in there,
        and small ones would be lost. See :meth:`~d2kd.views.families.TowerHead.resume`."""
        with FrozenLayers():
            return self.family.dense_head.resume(branch, depth, features)

    def decode(self, deltas: List[Tensor]) -> Tensor:
        """Boxes (N, R, 4) in pixels, as *this* detector understands raw box predictions.

        Args:
            deltas: per level, as in :class:`~d2kd.views.families.DensePredictions`.
        """
        return self.family.decode(deltas, self._anchors)

    def regions(self, regions: RegionSet, read: Regions) -> RegionOutputs:
        """What this detector makes of given boxes. Its box head runs once for the same regions, and
        not at all for some of those that it has seen.

        Args:
            regions: boxes in pixels of the padded batch.
            read: what is asked.
        """
        self._check(read)
        known = self._seen(regions, read.stage)
        if not known.answers(read):
            with self.precision():
                features = self._backbone_outputs
                known = self.family.box_head.run(features, regions.boxes, read, known.pooled)
        self._outputs[regions, read.stage] = known
        return known

    @property
    def asked(self) -> List[Tuple[RegionSet, int]]:
        """The regions that have been asked for so far, each with the number of the box head."""
        return list(self._outputs)

    def _seen(self, regions: RegionSet, stage: int) -> RegionOutputs:
        if (regions, stage) in self._outputs:
            return self._outputs[regions, stage]
        if regions.parent is None:
            return RegionOutputs()
        return self._seen(regions.parent, stage).of_rows(regions.rows)

    @property
    def _backbone_outputs(self) -> Dict[str, Tensor]:
        return self._recorder.output(self.family.backbone)

    @cached_property
    def _anchors(self) -> List[Boxes]:
        return self.family.anchors(list(self.levels.values()))

    def block(self, read: Tower) -> nn.Module:
        """The module that gives a tower; of depth 0, none does."""
        return self.family.dense_head.block(read.branch, read.depth, read.pre_activation)

    def _crop_levels(self, levels: List[Tensor]) -> List[Tensor]:
        return [self.crop_to_student(x, lv.stride) for x, lv in zip(levels, self.family.levels)]

    def _check(self, read: Read) -> None:
        if read not in self.reads:
            raise LookupError(
                f"a distiller reads '{read}', which its reads() does not declare: "
                f"declared are {', '.join(sorted(map(str, self.reads))) or 'none'}"
            )


class StudentView(View):
    """What the student did in its one training forward."""

    def __init__(
        self,
        family: Family,
        reads: Iterable[Read],
        recorder: Recorder,
        image_sizes: List[Tuple[int, int]],
        targets: List[Instances],
    ):
        """
        Args:
            family, reads, recorder: see :class:`View`.
            image_sizes: (height, width) of every image before padding.
            targets: ground truth per image, on the student's device.
        """
        super().__init__(family, reads, recorder)
        self._image_sizes = image_sizes
        self._targets = targets
        self._proposals: Dict[int, RegionSet] = {}

    @cached_property
    def images(self) -> ImageList:
        """The normalised, padded batch (N, 3, H, W) and the image sizes."""
        (batch, *_), _ = self._recorder.calls(self.family.backbone)[0]
        return ImageList(batch, self._image_sizes)

    @cached_property
    def assignment(self) -> AnchorTargets:
        self._check(Assignment())
        return self.family.recorded_assignment(self._recorder, self._anchors, self._targets)

    def proposals(self, read: Proposals) -> RegionSet:
        self._check(read)
        if read.stage not in self._proposals:
            head = self.family.box_head
            proposals = head.recorded_proposals(self._recorder, read.stage)
            regions = RegionSet.from_proposals(proposals)
            self._proposals[read.stage] = regions
            self._outputs[regions, read.stage] = head.recorded(self._recorder, read.stage)
        return self._proposals[read.stage]


class TeacherView(View):
    """What the teacher did on the student's batch. Nothing here has a gradient to its weights."""

    def __init__(
        self,
        family: Family,
        reads: Iterable[Read],
        recorder: Recorder,
        *,
        batch_size: Tuple[int, int],
        precision: Callable[[], contextlib.AbstractContextManager],
    ):
        """
        Args:
            family, reads, recorder: see :class:`View`.
            batch_size: (H, W) of the student's batch. The teacher's may be padded to a coarser
                grid.
            precision: makes the context in which the teacher runs.
        """
        super().__init__(family, reads, recorder)
        self._batch_size = batch_size
        self._precision = precision
        self._statistics: Dict[Tower, List[Statistics]] = {}
        self._proposals: Dict[Proposals, RegionSet] = {}
        self._branches: Dict[str, List[Tensor]] = {}

    def keep_branches(self, outputs: Dict[str, List[Tensor]]) -> None:
        """Gives the raw predictions of a head of which some branches alone were run."""
        self._branches.update(outputs)

    def _dense_outputs(self) -> Dict[str, Optional[List[Tensor]]]:
        return self._branches or super()._dense_outputs()

    def keep_statistics(self, read: Tower, statistics: List[Statistics]) -> None:
        """Gives the statistics of a tower whose maps need not be kept, per level."""
        self._statistics[read] = statistics

    def keep_proposals(self, read: Proposals, regions: RegionSet) -> None:
        """Gives the proposals that were sampled of the teacher's."""
        self._proposals[read] = regions

    def crop_to_student(self, x: Tensor, stride: int) -> Tensor:
        height, width = self._batch_size
        return x[..., : -(-height // stride), : -(-width // stride)]

    def precision(self) -> contextlib.AbstractContextManager:
        return self._precision()

    def tower_statistics(self, read: Tower) -> List[Statistics]:
        self._check(read)
        return self._statistics[read]

    def proposals(self, read: Proposals) -> RegionSet:
        self._check(read)
        return self._proposals[read]

    def regions(self, regions: RegionSet, read: Regions) -> RegionOutputs:
        with torch.no_grad():
            return super().regions(regions, read)

"""The teacher: a frozen detector, with its own preprocessing, precision and random numbers."""

import contextlib
import math
from typing import Dict, FrozenSet, Iterable, List, Set, Tuple

import torch
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.checkpoint import checksum
from d2kd.errors import UserError
from d2kd.layers import RandomStream, channel_statistics
from d2kd.layers.precision import PRECISIONS
from d2kd.views import (
    Dense,
    Family,
    Proposals,
    Read,
    Recorder,
    RegionSet,
    Stage,
    TeacherView,
    Tower,
    build_family,
)


class Teacher:
    """Holds the teacher outside the module tree, on purpose: so it is not saved, optimised,
    wrapped for distributed training, or switched to training mode.

    Attributes:
        detector: the detector, in eval mode, without gradients.
        family: its family.
        input_format: channel order of the images that it was trained with.
        weights: where its weights come from; "" if it is as initialised.
        verdict: what the file says of whether it fits, in words.
        checksum: of the weights as loaded, whatever becomes of them.
        precision_name: one of :data:`~d2kd.layers.precision.PRECISIONS`, or "" to run as the
            student does.
        random: inside of it, the teacher samples its proposals.
    """

    def __init__(
        self,
        detector: nn.Module,
        *,
        input_format: str,
        student: nn.Module,
        student_format: str,
        weights: str = "",
        verdict: str = "",
    ):
        """
        Args:
            detector: any detector of a registered family, best still on the CPU, where its
                checksum is taken.
            input_format: the teacher's ``INPUT.FORMAT``.
            student: the student, whose preprocessing may be the same.
            student_format: the student's ``INPUT.FORMAT``, in which images arrive.
            weights: where its weights come from.
            verdict: whether they fit, for the report on the pair.

        Raises:
            UserError: if a format cannot be made from the other.
        """
        if input_format != student_format and {input_format, student_format} != {"BGR", "RGB"}:
            raise UserError(
                f"INPUT.FORMAT is '{student_format}' and the teacher's is '{input_format}': only "
                "BGR and RGB can be turned into each other"
            )
        self.detector = detector.eval().requires_grad_(False)
        self.family = build_family(detector)
        self.input_format = input_format
        self.weights = weights
        self.verdict = verdict
        self.checksum = checksum(detector)
        self.precision_name = ""
        self.random = RandomStream()
        self._flip_channels = input_format != student_format
        same = self.family.pixels == build_family(student).pixels
        self._same_pixels = same and not self._flip_channels

    def precision(self) -> contextlib.AbstractContextManager:
        """The autocast context in which the teacher runs."""
        if not self.precision_name:
            return contextlib.nullcontext()
        dtype = PRECISIONS[self.precision_name]
        device_type = next(self.detector.parameters()).device.type
        return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)

    def preprocess(self, batched_inputs: List[Dict], student_images: ImageList) -> ImageList:
        """Normalises raw pixels with the teacher's channel order, mean and std, and pads them to
        the teacher's grid, at least as large as the student's batch.

        Args:
            batched_inputs: as Detectron2's mapper gives them, in the student's channel order.
            student_images: the student's batch.
        """
        if self._same_pixels:
            return student_images
        if self._flip_channels:
            batched_inputs = [{"image": x["image"].flip(0)} for x in batched_inputs]
        images = self.family.preprocess(batched_inputs)
        grid = max(self.family.pixels.size_divisibility, 1)
        (h, w), (h_s, w_s) = images.tensor.shape[-2:], student_images.tensor.shape[-2:]
        height = max(h, math.ceil(h_s / grid) * grid)
        width = max(w, math.ceil(w_s / grid) * grid)
        if (height, width) != (h, w):
            padded = F.pad(images.tensor, (0, width - w, 0, height - h))
            images = ImageList(padded, images.image_sizes)
        return images


class TeacherPass:
    """One pass of the teacher over a batch, no further than what is read of it: the backbone at
    the time that the caller chooses, the rest in :meth:`finish`."""

    def __init__(self, teacher: Teacher, batched_inputs: List[Dict], reads: Iterable[Read]):
        """
        Args:
            teacher: the teacher.
            batched_inputs: the student's.
            reads: what the methods declared; with none, nothing runs.
        """
        self._teacher = teacher
        self._inputs = batched_inputs
        self._reads: FrozenSet[Read] = frozenset(reads)
        self._sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        self._recorder = Recorder(self._family.observed(self._reads))
        self._batch_size: Tuple[int, int] = (0, 0)

    @property
    def _family(self) -> Family:
        return self._teacher.family

    def run_backbone(self, student_batch: Tensor) -> None:
        """
        Args:
            student_batch: the student's normalised, padded images, (N, 3, H, W).
        """
        self._batch_size = tuple(student_batch.shape[-2:])
        if not self._reads:
            return
        images = self._teacher.preprocess(self._inputs, ImageList(student_batch, self._sizes))
        stages_alone = all(isinstance(read, Stage) for read in self._reads)  # the FPN is not needed
        module = self._family.stage_module if stages_alone else self._family.backbone
        with torch.no_grad(), self._teacher.precision(), self._recorder:
            module(images.tensor)

    def finish(self, targets: List[Instances]) -> TeacherView:
        """Runs what else is read, and gives the view of it.

        Args:
            targets: ground truth per image, on the student's device.
        """
        view = TeacherView(
            self._family,
            self._reads,
            self._recorder,
            batch_size=self._batch_size,
            precision=self._teacher.precision,
        )
        towers = [read for read in self._reads if isinstance(read, Tower)]
        # In the same order in every process, for they are sampled
        proposals = sorted((x for x in self._reads if isinstance(x, Proposals)), key=repr)
        dense = any(isinstance(read, Dense) for read in self._reads)
        rpn = proposals and self._family.dense_head is not None
        if rpn or dense or any(tower.depth for tower in towers):
            self._run_head(view)
        with torch.no_grad():
            self._keep_statistics(view, [tower for tower in towers if tower.statistics])
            for read in proposals:
                view.keep_proposals(read, self._sample(read, targets))
        return view

    def _run_head(self, view: TeacherView) -> None:
        head, outputs = self._family.dense_head, self._recorder.output(self._family.backbone)
        levels = [outputs[level.name] for level in self._family.levels]
        branches = self._branches()
        with torch.no_grad(), self._teacher.precision(), self._recorder:
            if branches == {*head.branch_of.values()}:
                head.module(levels)
                return
            for branch in sorted(branches):
                view.keep_branches(head.resume(branch, 0, levels))

    def _branches(self) -> Set[str]:
        """The branches of the dense head that are read of; all of one that is sampled from."""
        branch_of = self._family.dense_head.branch_of
        if any(isinstance(read, Proposals) for read in self._reads):
            return {*branch_of.values()}
        outputs = {x for read in self._reads if isinstance(read, Dense) for x in read.outputs}
        towers = {x.branch for x in self._reads if isinstance(x, Tower) and x.depth}
        return {branch_of[x] for x in outputs if x in branch_of} | towers

    def _keep_statistics(self, view: TeacherView, towers: List[Tower]) -> None:
        for read in towers:
            view.keep_statistics(read, [channel_statistics(x) for x in view.tower(read)])
        kept = [x for x in self._reads if isinstance(x, Tower) and x.depth and not x.statistics]
        maps = {view.block(x) for x in kept}
        for read in towers:
            if read.depth and view.block(read) not in maps:
                self._recorder.forget(view.block(read))  # the maps themselves go

    def _sample(self, read: Proposals, targets: List[Instances]) -> RegionSet:
        family = self._family
        features = self._recorder.output(family.backbone)
        rpn = family.dense_head
        outputs = self._recorder.output(rpn.module) if rpn is not None else None
        with self._teacher.precision(), self._teacher.random:
            proposals = family.propose(features, outputs, self._sizes)
            sampled = family.box_head.sample(features, proposals, targets, read.stage)
        return RegionSet.from_proposals(sampled)

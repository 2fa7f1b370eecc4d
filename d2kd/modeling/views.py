"""Views: what a distiller may read of one detector on one batch.

The student's view is recorded from its one training forward. The teacher's view runs the parts of
the teacher that are asked for, once, when they are asked for.

Shapes: N images, (H, W) the padded batch, C channels, (h, w) the size of an FPN level.
"""

import contextlib
from functools import cached_property
from typing import Dict, List, Tuple

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from .channel_statistics import channel_statistics
from .dense_view import Dense
from .families import Family, RoIs
from .recorder import Recorder


def _in_backbone(tap: str) -> bool:
    return tap.split(".")[0] in ("backbone", "stages")


class View:
    """One detector on one batch. Everything is computed once, at the first reading."""

    def __init__(self, family: Family):
        self.family = family
        self._proposals: Dict[int, List[Instances]] = {}

    def calls(self, tap: str) -> List[Tuple]:
        """(inputs, output) of every call of an observed module, see ``Family.taps``."""
        raise NotImplementedError

    def fit(self, levels: List[Tensor]) -> List[Tensor]:
        """Brings per-level maps of the whole pyramid to the sizes that the student's have."""
        return levels

    def precision(self) -> contextlib.AbstractContextManager:
        """The autocast context in which this detector runs."""
        return contextlib.nullcontext()

    @property
    def images(self) -> ImageList:
        """The normalised, padded batch (N, 3, H, W) and the image sizes."""
        raise NotImplementedError

    @cached_property
    def stages(self) -> Dict[str, Tensor]:
        """Backbone stage outputs by name, (N, C, H / stride, W / stride)."""
        return self.calls("stages")[0][1]

    def stage_before_relu(self, name: str) -> Tensor:
        """A backbone stage before its last ReLU, as in :attr:`stages`."""
        return self.calls(f"stages.{name}.pre")[0][1]

    @cached_property
    def features(self) -> Dict[str, Tensor]:
        """FPN levels by name, finest first, (N, C, H / stride, W / stride)."""
        outputs = self.calls("backbone")[0][1]
        names = [level.name for level in self.family.levels]
        return dict(zip(names, self.fit([outputs[name] for name in names])))

    @cached_property
    def dense(self) -> Dense:
        """The dense head (of a two-stage detector: its RPN) on this batch."""
        return Dense(self)

    @property
    def proposals(self) -> List[Instances]:
        """The sampled, labelled proposals of a two-stage detector, per image: ``proposal_boxes``,
        ``gt_classes`` (K = background) and, where there is ground truth, ``gt_boxes``."""
        return self.proposals_of(0)

    def proposals_of(self, stage: int) -> List[Instances]:
        """The proposals that one box head of a cascade is trained on; stages count from 0."""
        if stage not in self._proposals:
            self._proposals[stage] = self._sample(stage)
        return self._proposals[stage]

    def _sample(self, stage: int) -> List[Instances]:
        raise NotImplementedError

    def rois(self, boxes: List[Boxes], stage: int = 0) -> RoIs:
        """RoI features, hidden vectors, class logits and box deltas of given boxes.

        Args:
            boxes: per image, in pixels of the padded batch. The box head runs once for the same
                Boxes objects; it does not run for those that the student's own forward saw.
            stage: which box head of a cascade.
        """
        key = _rois_key(boxes, stage)
        if key not in self._rois:
            features = self.calls("backbone")[0][1]
            with self.precision():
                self._rois[key] = boxes, self.family.box_head.run(features, boxes, stage)
        return self._rois[key][1]

    def select(self, boxes: List[Boxes], kept: List[Tensor]) -> List[Boxes]:
        """Some of the boxes. Where the box head has seen all, :meth:`rois` of some does not run it.

        Args:
            boxes: per image.
            kept: per image, a bool for every box.
        """
        some = [b[k] for b, k in zip(boxes, kept)]
        key = _rois_key(boxes, 0)
        if "rois" in self.family.offers and key in self._rois:
            rows = torch.cat(kept)
            rois = RoIs(*[x if x is None else x[rows] for x in self._rois[key][1]])
            self._rois[_rois_key(some, 0)] = some, rois
        return some

    @cached_property
    def _rois(self) -> Dict[Tuple, Tuple[List[Boxes], RoIs]]:
        # The boxes are kept so that their ids stay theirs.
        return {}


def _rois_key(boxes: List[Boxes], stage: int) -> Tuple:
    return (stage, *(id(b.tensor) for b in boxes))


class StudentView(View):
    """What the student did in its one training forward."""

    def __init__(self, family: Family, recorder: Recorder, image_sizes: List[Tuple[int, int]]):
        """
        Args:
            family: the student's.
            recorder: of the forward. The images can be read as soon as the backbone starts, all
                else afterwards.
            image_sizes: (height, width) of every image before padding.
        """
        super().__init__(family)
        self._recorder = recorder
        self._image_sizes = image_sizes

    def calls(self, tap: str) -> List[Tuple]:
        return self._recorder.calls[tap]

    @cached_property
    def images(self) -> ImageList:
        (batch, *_), _ = self.calls("backbone")[0]
        return ImageList(batch, self._image_sizes)

    def _sample(self, stage: int) -> List[Instances]:
        return self.family.box_head.recorded_proposals(self._recorder.calls, stage)

    @cached_property
    def _rois(self) -> Dict[Tuple, Tuple[List[Boxes], RoIs]]:
        seen = self.family.box_head.recorded(self._recorder.calls)
        return {_rois_key(boxes, k): (boxes, rois) for k, (boxes, rois) in enumerate(seen)}


class TeacherView(View):
    """The teacher on the student's batch, run as far as asked: backbone and FPN for features and
    stages, the dense head for its predictions and towers."""

    def __init__(self, teacher, batched_inputs: List[Dict], student: StudentView, taps: Dict):
        """
        Args:
            teacher: a :class:`~d2kd.modeling.teacher.Teacher`.
            batched_inputs: the student's, images with pixels as the student's loader gives them.
            student: the student's view of the same batch.
            taps: the teacher's modules to observe, from ``Family.taps``.
        """
        super().__init__(teacher.family)
        self._teacher = teacher
        self._inputs = batched_inputs
        self._student = student
        self._taps = taps
        self._calls: Dict[str, List[Tuple]] = {}

    def calls(self, tap: str) -> List[Tuple]:
        if tap not in self._calls:
            self._run("backbone" if _in_backbone(tap) else "head")
        return self._calls[tap]

    def run_backbone(self) -> None:
        """Runs the backbone now, and not when it is first read."""
        self.calls("backbone")

    def _run(self, part: str) -> None:
        in_backbone = {k: m for k, m in self._taps.items() if _in_backbone(k)}
        in_head = {k: m for k, m in self._taps.items() if k not in in_backbone}
        detector = self.family.detector
        with torch.no_grad(), self.precision():
            if part == "backbone":
                with Recorder(in_backbone) as recorder:
                    detector.backbone(self.images.tensor)
            else:
                outputs = self.calls("backbone")[0][1]
                with Recorder(in_head) as recorder:
                    self.family.dense_head.run([outputs[lv.name] for lv in self.family.levels])
        for tap, calls in recorder.calls.items():
            if tap.endswith(".statistics"):  # the maps themselves go
                maps = self.fit([output for _, output in calls])
                calls[:] = [(None, channel_statistics(x)) for x in maps]
        self._calls.update(recorder.calls)

    def precision(self) -> contextlib.AbstractContextManager:
        return self._teacher.precision()

    def fit(self, levels: List[Tensor]) -> List[Tensor]:
        return [self._crop(x, level.stride) for x, level in zip(levels, self.family.levels)]

    def _crop(self, x: Tensor, stride: int) -> Tensor:
        # The teacher may pad to a coarser grid than the student; what is beyond is padding.
        height, width = self._student.images.tensor.shape[-2:]
        return x[..., : -(-height // stride), : -(-width // stride)]

    @cached_property
    def stages(self) -> Dict[str, Tensor]:
        outputs = self.calls("stages")[0][1]
        return {s.name: self._crop(outputs[s.name], s.stride) for s in self.family.stages}

    def stage_before_relu(self, name: str) -> Tensor:
        stride = next(stage.stride for stage in self.family.stages if stage.name == name)
        return self._crop(super().stage_before_relu(name), stride)

    @property
    def images(self) -> ImageList:  # not kept: only the backbone reads them
        return self._teacher.preprocess(self._inputs, self._student.images)

    def _sample(self, stage: int) -> List[Instances]:
        features = self.calls("backbone")[0][1]
        targets = [x["instances"].to(self._student.images.device) for x in self._inputs]
        with self.precision():
            proposals = self.family.propose(
                features, self.calls("head")[0][1], self._student.images.image_sizes
            )
            return self.family.box_head.sample(features, proposals, targets, stage)

    def rois(self, boxes: List[Boxes], stage: int = 0) -> RoIs:
        with torch.no_grad():
            return super().rois(boxes, stage)

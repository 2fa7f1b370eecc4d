"""The teacher: a frozen detector, with its own preprocessing and precision."""

import contextlib
import math
from typing import Dict, FrozenSet, List, Tuple

import torch
from detectron2.structures import ImageList
from torch import nn
from torch.nn import functional as F

from d2kd.errors import UserError, nearest

from .families import build_family
from .views import StudentView, TeacherView

# Names in DISTILL.TEACHER.PRECISION
PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Teacher:
    """Holds the teacher outside the module tree, on purpose: so it is not saved, optimised,
    wrapped for distributed training, or switched to training mode.

    Attributes:
        detector: the detector, in eval mode, without gradients.
        family: its family adapter.
        input_format: channel order of the images that it was trained with.
    """

    def __init__(
        self,
        detector: nn.Module,
        *,
        input_format: str,
        student: nn.Module,
        student_format: str,
        precision: str = "",
    ):
        """
        Args:
            detector: any detector of a registered family.
            input_format: the teacher's ``INPUT.FORMAT``.
            student: the student, whose preprocessing may be the same.
            student_format: the student's ``INPUT.FORMAT``, in which images arrive.
            precision: one of :data:`PRECISIONS`, or "" to run as the student does.

        Raises:
            UserError: if the precision is unknown, or a format cannot be made from the other.
        """
        if precision and precision not in PRECISIONS:
            raise UserError(
                f"DISTILL.TEACHER.PRECISION is '{precision}': {nearest(precision, PRECISIONS)}"
            )
        if input_format != student_format and {input_format, student_format} != {"BGR", "RGB"}:
            raise UserError(
                f"INPUT.FORMAT is '{student_format}' and the teacher's is '{input_format}': only "
                "BGR and RGB can be turned into each other"
            )
        self.detector = detector.eval().requires_grad_(False)
        self.family = build_family(detector)
        self.input_format = input_format
        self._flip_channels = input_format != student_format
        self._same_pixels = not self._flip_channels and _pixels(detector) == _pixels(student)
        self._precision = precision

    def precision(self) -> contextlib.AbstractContextManager:
        """The autocast context in which the teacher runs."""
        if not self._precision:
            return contextlib.nullcontext()
        dtype = PRECISIONS[self._precision]
        device_type = self.detector.pixel_mean.device.type
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
        images = self.detector.preprocess_image(batched_inputs)
        grid = max(self.detector.backbone.size_divisibility, 1)
        (h, w), (h_s, w_s) = images.tensor.shape[-2:], student_images.tensor.shape[-2:]
        height = max(h, math.ceil(h_s / grid) * grid)
        width = max(w, math.ceil(w_s / grid) * grid)
        if (height, width) != (h, w):
            padded = F.pad(images.tensor, (0, width - w, 0, height - h))
            images = ImageList(padded, images.image_sizes)
        return images

    def view(
        self, batched_inputs: List[Dict], student: StudentView, needs: FrozenSet[str]
    ) -> TeacherView:
        """The teacher on a batch. Nothing is run yet.

        Args:
            batched_inputs: the student's.
            student: the student's view of the batch.
            needs: what the distillers may ask for, out of ``Family.offers``.
        """
        return TeacherView(self, batched_inputs, student, self.family.taps(needs))


def _pixels(detector: nn.Module) -> Tuple:
    """All that turns an image into a detector's input."""
    backbone = detector.backbone
    return (
        detector.pixel_mean.flatten().tolist(),
        detector.pixel_std.flatten().tolist(),
        backbone.size_divisibility,
        getattr(backbone, "padding_constraints", None),
    )

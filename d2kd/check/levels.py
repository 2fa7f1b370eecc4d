"""Whether a two-stage teacher has learned on the FPN levels that are compared."""

import logging
from typing import List

import torch
from detectron2.structures import Boxes
from torch import nn

from d2kd.distillation import TeacherStudent
from d2kd.views import Features

logger = logging.getLogger(__name__)

_WARN_SHARE = 0.5  # of the objects
# What else could be compared, by the method that does
_INSTEAD = {
    "GDetKD": "compare regions (--method GDetKD)",
    "HGD": "compare backbone stages (--method HGD)",
}


def warn_of_unused_levels(model: nn.Module, boxes: List[Boxes]) -> None:
    """Logs a warning if a two-stage teacher's box head pools most objects from FPN levels that the
    student lacks, while methods compare those that it has: such a teacher has learned little there.

    Args:
        model: in training.
        boxes: ground truth of some images as they are trained on.
    """
    box_head = model.teacher.family.box_head if isinstance(model, TeacherStudent) else None
    if box_head is None or not any(map(len, boxes)):
        return
    methods = {name for (name, _), r in model.reads.items() if Features() in r.teacher}
    if not methods:
        return
    strides = box_head.strides_of(boxes)
    of_student = torch.tensor([level.stride for level in model.family.levels])
    elsewhere = ~torch.isin(strides, of_student)
    share = elsewhere.float().mean().item()
    if share > _WARN_SHARE:
        level = strides[elsewhere].mode().values.item()
        instead = [advice for name, advice in _INSTEAD.items() if name not in methods]
        logger.warning(
            f"the teacher's box head pools {share:.0%} of the objects from its level of stride "
            f"{level}, which the student lacks. On those that {', '.join(sorted(methods))} may "
            "compare it has learned little, and they can make the student worse "
            f"(docs/results/side-by-side.md): {', or '.join([*instead, 'take a dense teacher'])}"
        )

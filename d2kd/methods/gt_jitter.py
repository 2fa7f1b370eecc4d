"""Regions around objects: their boxes, shifted and stretched at random.

Shapes: G objects of an image, B regions.
"""

import torch
from detectron2.structures import Boxes, Instances

# How far a centre moves at most, in widths and heights of the object
MAX_SHIFT = 0.25
# By how much width and height grow or shrink at most
MAX_STRETCH = 1.5


@torch.no_grad()
def jittered_objects(target: Instances, count: int) -> Instances:
    """
    Args:
        target: ground truth of an image.
        count: B, shared evenly among the objects.

    Returns:
        B boxes within the image, ``proposal_boxes``, and the classes of the objects that they were
        made from, ``gt_classes``; none if there are no objects. The random numbers are torch's.
    """
    boxes = target.gt_boxes.tensor
    place = torch.arange(count if len(boxes) else 0, device=boxes.device)
    origin = place % max(len(boxes), 1)
    center, size = target.gt_boxes.get_centers()[origin], (boxes[:, 2:] - boxes[:, :2])[origin]
    shift, stretch = (2 * torch.rand(len(origin), 4, device=boxes.device) - 1).split(2, dim=1)
    center = center + MAX_SHIFT * shift * size
    half = MAX_STRETCH**stretch * size / 2
    jittered = Boxes(torch.cat([center - half, center + half], dim=1))
    jittered.clip(target.image_size)
    return Instances(
        target.image_size, proposal_boxes=jittered, gt_classes=target.gt_classes[origin]
    )

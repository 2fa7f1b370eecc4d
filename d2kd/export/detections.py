"""A detector as a function from one image tensor to plain tensors, which can be traced.

Shapes: C channels, (H, W) the size of the image, N detections.
"""

from typing import Dict, List, NamedTuple, Optional

import numpy as np
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

MASKS = "masks"
# In the order in which a program returns them
OUTPUTS = ("boxes", "classes", MASKS, "scores")


class Detections(NamedTuple):
    """What a detector finds in an image."""

    boxes: np.ndarray  # (N, 4) xyxy in pixels of the input
    classes: np.ndarray  # (N,) integers
    scores: np.ndarray  # (N,)
    masks: Optional[np.ndarray] = None  # (N, 28, 28), probabilities within the box


def output_names(detector: nn.Module) -> List[str]:
    """The names of a program's outputs, in order."""
    masks = getattr(getattr(detector, "roi_heads", None), "mask_on", False)
    return [name for name in OUTPUTS if masks or name != MASKS]


def traceable(detector: nn.Module, image: Tensor) -> TracingAdapter:
    """
    Args:
        detector: in eval mode.
        image: (C, H, W) float32, to trace it with.

    Returns:
        a module from such an image to what :func:`output_names` tells.
    """
    return TracingAdapter(detector, [{"image": image}], detected).eval()


def detected(detector: nn.Module, inputs: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
    """Detections of one image, as tensors by name, sorted by name. Masks stay as the head predicts
    them: pasting them into the image is a loop whose length a traced program cannot change."""
    if isinstance(detector, GeneralizedRCNN):
        found = detector.inference(inputs, do_postprocess=False)[0]
        found = found[found.pred_boxes.nonempty()]  # as what follows in Detectron2 does
    else:
        found = detector(inputs)[0]["instances"]
    outputs = {
        "boxes": found.pred_boxes.tensor,
        "classes": found.pred_classes,
        "scores": found.scores,
    }
    if found.has("pred_masks"):
        outputs[MASKS] = found.pred_masks[:, 0]
    return outputs


@torch.no_grad()
def detect(detector: nn.Module, image: Tensor) -> Detections:
    """What a detector finds in an image (C, H, W) of its input size."""
    return Detections(
        **{k: v.cpu().numpy() for k, v in detected(detector, [{"image": image}]).items()}
    )

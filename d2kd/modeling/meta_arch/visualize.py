"""Pictures of a dense detector's predictions during training."""

from typing import List

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor


@torch.no_grad()
def visualize_predictions(
    detector: DenseDetector,
    images: ImageList,
    features: List[Tensor],
    predictions: List[List[Tensor]],
    gt_instances: List[Instances],
) -> None:
    """Every ``detector.vis_period`` iterations, puts a picture of the first image with its
    ground truth and its detections into the event storage.

    Detectron2's dense detectors offer ``visualize_training`` but nothing calls it. This works on
    what a training step has at hand, so that the step keeps its one forward.

    Args:
        detector: has ``vis_period`` and ``input_format``.
        images: the normalised batch.
        features, predictions: inputs and outputs of the head.
        gt_instances: per image.
    """
    if detector.vis_period <= 0 or get_event_storage().iter % detector.vis_period:
        return
    pixels = images[0] * detector.pixel_std + detector.pixel_mean
    inputs = {
        "image": pixels.clamp(0, 255).byte().cpu(),
        "instances": gt_instances[0].to("cpu"),
    }
    first = ImageList(images.tensor[:1], images.image_sizes[:1])
    # Inference works in place on what it is given.
    copies = [[x[:1].clone() for x in levels] for levels in predictions]
    results = detector.forward_inference(first, [x[:1] for x in features], copies)
    detector.visualize_training([inputs], results)

"""From the predictions of a dense head to detections, as in the code of ATSS, GFL and FCOS.

Unlike Detectron2's own, the threshold and the top candidates go by the class score alone;
centerness, if there is one, multiplies the score afterwards.
"""

from typing import List, Optional, Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor


def float_predictions(levels: List[Tensor]) -> List[Tensor]:
    """A head's predictions in the order of the anchors, as float32.

    Args:
        levels: (N, D, h, w) per level, one prediction per location.

    Returns:
        (N, h x w, D) per level.
    """
    return [permute_to_N_HWA_K(x, x.shape[1]).float() for x in levels]


def detect(
    detector: DenseDetector,
    images: ImageList,
    features: List[Tensor],
    predictions: Sequence[List[Tensor]],
) -> List[Instances]:
    """
    Args:
        detector: has one anchor per location, ``box2box_transform`` and the ``test_...`` settings
            of Detectron2's RetinaNet.
        images: the batch.
        features, predictions: inputs and outputs of the head: logits, deltas and, if there is
            one, centerness.

    Returns:
        per image "pred_boxes" in pixels of the padded input, "scores", "pred_classes".
    """
    anchors = detector.anchor_generator(features)
    flat = [float_predictions(levels) for levels in predictions]
    results = []
    for i, image_size in enumerate(images.image_sizes):
        candidates = [
            _candidates(detector, image_size, level_anchors, *[x[i] for x in level])
            for level_anchors, *level in zip(anchors, *flat)
        ]
        found = Instances.cat(candidates)
        # Boxes that clipping emptied would take places among the best and vanish afterwards.
        found = found[found.pred_boxes.nonempty()]
        keep = batched_nms(
            found.pred_boxes.tensor, found.scores, found.pred_classes, detector.test_nms_thresh
        )
        results.append(found[keep[: detector.max_detections_per_image]])
    return results


def _candidates(
    detector: DenseDetector,
    image_size,
    anchors: Boxes,
    logits: Tensor,
    deltas: Tensor,
    centerness: Optional[Tensor] = None,
) -> Instances:
    """What of one level of one image goes into NMS; predictions are (h x w, D)."""
    scores = logits.sigmoid().flatten()
    index = (scores > detector.test_score_thresh).nonzero()[:, 0]
    # Sorted and cut, not topk: a traced model takes images of other sizes.
    scores, order = scores[index].sort(descending=True)
    scores, index = (x[: detector.test_topk_candidates] for x in (scores, index[order]))
    location = torch.div(index, logits.shape[1], rounding_mode="floor")
    boxes = Boxes(
        detector.box2box_transform.apply_deltas(deltas[location], anchors.tensor[location])
    )
    boxes.clip(image_size)
    if centerness is not None:
        scores = scores * centerness[location, 0].sigmoid()
    return Instances(
        image_size, pred_boxes=boxes, scores=scores, pred_classes=index % logits.shape[1]
    )

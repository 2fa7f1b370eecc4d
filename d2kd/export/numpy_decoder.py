"""From the raw head outputs of an exported detector to detections. Needs NumPy alone.

    import json, numpy, onnxruntime
    from student_decoder import decode, pad

    session = onnxruntime.InferenceSession("student.onnx")
    settings = json.loads(session.get_modelmeta().custom_metadata_map["decoder"])
    image = ...  # (C, H, W) float32, resized, channels in the order of "input_format"
    batch = pad(image, settings)[None]
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"images": batch})))
    boxes, classes, scores = decode(outputs, settings, image.shape[1:])

Shapes: A anchors per location, K classes, (h, w) the size of an FPN level, N detections.
Boxes are x1, y1, x2, y2 in pixels of the input.
"""

from typing import Any, Dict, List, Mapping, Tuple

import numpy as np


def pad(image: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """(C, H, W) with pixel_mean at the right and the bottom, to multiples of size_divisibility."""
    divisor = settings["size_divisibility"]
    height, width = (-(-side // divisor) * divisor for side in image.shape[1:])
    mean = np.asarray(settings["pixel_mean"], np.float32)[:, None, None]
    padded = np.broadcast_to(mean, (len(mean), height, width)).copy()
    padded[:, : image.shape[1], : image.shape[2]] = image
    return padded


def decode(
    outputs: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    size: Tuple[int, int],
    index: int = 0,
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Args:
        outputs: of the program, by name.
        settings: its metadata "decoder".
        size: (H, W) of the image before padding.
        index: of the image in the batch.

    Returns:
        boxes (N, 4), classes (N,), scores (N,), highest scores first.
    """
    candidates = [
        _candidates(
            {k: outputs[f"{k}_{level['name']}"][index] for k in settings["heads"]}, level, settings
        )
        for level in settings["levels"]
    ]
    boxes, classes, scores = (np.concatenate(x) for x in zip(*candidates))
    clipped = _clip(boxes, size)
    inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    if settings["clip_before_nms"]:
        boxes, classes, scores = clipped[inside], classes[inside], scores[inside]
    keep = _nms(boxes, classes, scores, settings["nms_threshold"])[: settings["max_detections"]]
    boxes, classes, scores = _clip(boxes[keep], size), classes[keep], scores[keep]
    nonempty = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return boxes[nonempty], classes[nonempty], scores[nonempty]


def _candidates(
    heads: Dict[str, np.ndarray], level: Mapping[str, Any], settings: Mapping[str, Any]
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best boxes of one level, before NMS."""
    height, width = heads["logits"].shape[-2:]
    cells = np.asarray(level["cell_anchors"], np.float32)  # (A, 4) around the first location
    flat = {name: _flatten(x, len(cells)) for name, x in heads.items()}
    scores = _sigmoid(flat["logits"])  # (h x w x A, K)
    quality = _sigmoid(flat["centerness"]) if "centerness" in flat else None
    if settings["score"] == "sqrt of class and centerness":
        scores = np.sqrt(scores * quality)
    anchor, label = np.nonzero(scores > settings["score_threshold"])
    values = scores[anchor, label]
    best = np.argsort(-values, kind="stable")[: settings["topk_candidates"]]
    anchor, label, values = anchor[best], label[best], values[best]
    anchors = _anchors(cells, level["stride"], settings["anchor_offset"], height, width)[anchor]
    boxes = _decoders[settings["box_coding"]](flat["deltas"][anchor], anchors, settings)
    if settings["score"] == "class, then centerness":
        values = values * quality[anchor, 0]
    return boxes, label, values


def _flatten(x: np.ndarray, num_anchors: int) -> np.ndarray:
    """(A x D, h, w) -> (h x w x A, D), Detectron2's order of anchors."""
    height, width = x.shape[1:]
    return (
        x.reshape(num_anchors, -1, height, width)
        .transpose(2, 3, 0, 1)
        .reshape(height * width * num_anchors, -1)
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float32)))


def _anchors(
    cells: np.ndarray, stride: float, offset: float, height: int, width: int
) -> np.ndarray:
    """(h x w x A, 4)."""
    y, x = np.meshgrid(
        (np.arange(height) + offset) * stride, (np.arange(width) + offset) * stride, indexing="ij"
    )
    shifts = np.stack((x, y, x, y), axis=-1).reshape(-1, 1, 4)
    return (shifts + cells).reshape(-1, 4).astype(np.float32)


def _decode_deltas(
    deltas: np.ndarray, anchors: np.ndarray, settings: Mapping[str, Any]
) -> np.ndarray:
    """Shifts of the centre in anchor sizes, and logarithms of the growth."""
    deltas = deltas / np.asarray(settings["box_weights"], np.float32)
    size = anchors[:, 2:] - anchors[:, :2]
    center = anchors[:, :2] + size / 2 + deltas[:, :2] * size
    half = np.exp(np.minimum(deltas[:, 2:], settings["scale_clamp"])) * size / 2
    return np.concatenate((center - half, center + half), axis=1)


def _decode_distances(
    distances: np.ndarray, anchors: np.ndarray, settings: Mapping[str, Any]
) -> np.ndarray:
    """Distances of the four sides from the centre, in pixels or in anchor widths."""
    unit = anchors[:, 2:3] - anchors[:, :1] if settings["normalize_by_size"] else 1.0
    distances = np.maximum(distances, 0) * unit
    center = (anchors[:, :2] + anchors[:, 2:]) / 2
    return np.concatenate((center - distances[:, :2], center + distances[:, 2:]), axis=1)


def _decode_distributions(
    logits: np.ndarray, anchors: np.ndarray, settings: Mapping[str, Any]
) -> np.ndarray:
    """The mean of a distribution over 0, 1, ... strides per side."""
    bins = settings["num_bins"]
    logits = logits.reshape(len(logits), 4, bins)
    p = np.exp(logits - logits.max(axis=2, keepdims=True))
    p = p / p.sum(axis=2, keepdims=True)
    stride = (anchors[:, 2:3] - anchors[:, :1]) / settings["anchor_scale"]
    distances = (p * np.arange(bins)).sum(axis=2) * stride
    center = (anchors[:, :2] + anchors[:, 2:]) / 2
    return np.concatenate((center - distances[:, :2], center + distances[:, 2:]), axis=1)


_decoders = {
    "deltas": _decode_deltas,
    "distances": _decode_distances,
    "distributions": _decode_distributions,
}


def _clip(boxes: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    height, width = size
    return np.clip(boxes, 0, np.array([width, height, width, height], boxes.dtype))


def _nms(
    boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, threshold: float
) -> np.ndarray:
    """Indices of the boxes that remain, highest scores first: one that overlaps a better one of its
    class by more than the threshold (IoU) goes."""
    order = np.argsort(-scores, kind="stable")
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: List[int] = []
    while len(order):
        first, rest = order[0], order[1:]
        kept.append(int(first))
        upper = np.maximum(boxes[first, :2], boxes[rest, :2])
        lower = np.minimum(boxes[first, 2:], boxes[rest, 2:])
        overlap = np.prod(np.maximum(lower - upper, 0), axis=1)
        iou = overlap / np.maximum(area[first] + area[rest] - overlap, 1e-9)
        order = rest[(classes[rest] != classes[first]) | (iou <= threshold)]
    return np.array(kept, dtype=int)

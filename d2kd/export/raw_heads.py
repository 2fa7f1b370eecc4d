"""A dense detector up to its heads, without anchors, boxes and NMS.

Shapes: N images, C channels, (H, W) the size of the padded batch, A anchors per location, D numbers
per anchor, (h, w) the size of an FPN level.
"""

from typing import Any, Dict, List, Sequence, Tuple

from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.meta_arch import RetinaNet, fcos
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

from d2kd.errors import UserError
from d2kd.modeling.meta_arch import PaperFCOS
from d2kd.modeling.meta_arch.integral import IntegralBoxTransform

_HEADS = ("logits", "deltas", "centerness")


class RawHeads(nn.Module):
    """From a padded batch of pixels to the maps of the heads.

    Attributes:
        heads: what is predicted: "logits", "deltas" and, if there is one, "centerness".
        levels: names of the FPN levels, finest first.
    """

    def __init__(self, detector: nn.Module):
        """
        Args:
            detector: in eval mode.

        Raises:
            UserError: if it has no dense head.
        """
        super().__init__()
        if not isinstance(detector, DenseDetector):
            raise UserError(
                f"--raw-heads is for dense detectors, but the student is a "
                f"{type(detector).__name__}, whose second stage needs the boxes of its first: "
                "leave --raw-heads away"
            )
        self.detector = detector
        self.levels = list(detector.head_in_features)
        centerness = hasattr(detector.head, "ctrness")
        self.heads = _HEADS if centerness else _HEADS[:2]

    @property
    def output_names(self) -> List[str]:
        """In the order of :meth:`forward`."""
        return [f"{head}_{level}" for head in self.heads for level in self.levels]

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """
        Args:
            images: (N, C, H, W), H and W multiples of what the backbone asks for.

        Returns:
            (N, A·D, h, w) per head and level.
        """
        normalized = (images - self.detector.pixel_mean) / self.detector.pixel_std
        features = self.detector.backbone(normalized)
        predictions = self.detector.head([features[name] for name in self.levels])
        return tuple(x for levels in predictions for x in levels)


def decoder_settings(raw: RawHeads) -> Dict[str, Any]:
    """What ``numpy_decoder.py`` has to know of a detector.

    Raises:
        UserError: if it codes boxes in a way that the decoder does not know.
    """
    detector = raw.detector
    generator = detector.anchor_generator
    return {
        "heads": list(raw.heads),
        "levels": [
            {"name": name, "stride": stride, "cell_anchors": cells.tolist()}
            for name, stride, cells in zip(raw.levels, generator.strides, generator.cell_anchors)
        ],
        "anchor_offset": generator.offset,
        "score": _score(detector),
        "score_threshold": detector.test_score_thresh,
        "topk_candidates": detector.test_topk_candidates,
        "nms_threshold": detector.test_nms_thresh,
        "max_detections": detector.max_detections_per_image,
        "clip_before_nms": not _is_detectron2s(detector),
        "size_divisibility": max(detector.backbone.size_divisibility, 1),
        "pixel_mean": detector.pixel_mean.flatten().tolist(),
        **_box_coding(detector.box2box_transform),
    }


def _is_detectron2s(detector: DenseDetector) -> bool:
    """Whether detections are made by Detectron2's code, not by ``d2kd.modeling``."""
    return isinstance(detector, (RetinaNet, fcos.FCOS)) and not isinstance(detector, PaperFCOS)


def _score(detector: DenseDetector) -> str:
    if not hasattr(detector.head, "ctrness"):
        return "class"
    return "sqrt of class and centerness" if _is_detectron2s(detector) else "class, then centerness"


def _box_coding(transform: Any) -> Dict[str, Any]:
    if isinstance(transform, Box2BoxTransform):
        weights: Sequence[float] = transform.weights
        return {
            "box_coding": "deltas",
            "box_weights": list(weights),
            "scale_clamp": transform.scale_clamp,
        }
    if isinstance(transform, Box2BoxTransformLinear):
        return {"box_coding": "distances", "normalize_by_size": transform.normalize_by_size}
    if isinstance(transform, IntegralBoxTransform):
        return {
            "box_coding": "distributions",
            "num_bins": transform.num_bins,
            "anchor_scale": transform.anchor_scale,
        }
    raise UserError(
        f"--raw-heads: the decoder does not know {type(transform).__name__}, which codes the "
        "student's boxes: leave --raw-heads away"
    )

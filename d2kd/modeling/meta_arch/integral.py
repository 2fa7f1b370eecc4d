"""GFL's boxes: four distances, each the mean of a predicted distribution."""

import torch
from torch import Tensor


def integral(logits: Tensor, num_bins: int) -> Tensor:
    """Mean of each predicted distribution (GFL eq. 4).

    Args:
        logits: (..., S x B), B = ``num_bins`` per side, sides outermost.
        num_bins: over the distances 0, 1, ..., B - 1.

    Returns:
        (..., S) in [0, B - 1].
    """
    # Every shape is said, none inferred: ONNX cannot infer a side's from no boxes at all, and the
    # sum of onnxruntime over no boxes keeps the bins.
    sides = logits.shape[-1] // num_bins
    p = logits.unflatten(-1, (sides, num_bins)).softmax(dim=-1)
    # Not a matrix product: mixed precision would run that in half precision.
    means = (p * torch.arange(num_bins, dtype=p.dtype, device=p.device)).sum(dim=-1)
    return means.reshape(*logits.shape[:-1], sides)


class IntegralBoxTransform:
    """Codes a box as its distances from the anchor's centre, in strides, and decodes it from one
    distribution per side. Used like Detectron2's box transforms."""

    def __init__(self, reg_max: int = 16, anchor_scale: float = 8):
        """
        Args:
            reg_max: the largest distance, in strides; a side has ``reg_max + 1`` bins.
            anchor_scale: width of the square anchors, in strides.
        """
        self.num_bins = reg_max + 1
        self.anchor_scale = anchor_scale

    def get_deltas(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """
        Args:
            anchors: (..., 4), squares.
            boxes: (..., 4) in pixels.

        Returns:
            (..., 4) distances left, top, right, bottom in strides, within [0, reg_max - 0.1].
        """
        center, stride = self._center_and_stride(anchors)
        distances = torch.cat((center - boxes[..., :2], boxes[..., 2:] - center), dim=-1)
        # The highest bin must stay above the distance: its left neighbour is floor(distance).
        return (distances / stride).clamp(min=0, max=self.num_bins - 1.1)

    def apply_deltas(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """
        Args:
            deltas: (..., 4 x (reg_max + 1)) logits.
            anchors: (..., 4), squares.

        Returns:
            (..., 4) boxes in pixels.
        """
        center, stride = self._center_and_stride(anchors)
        distances = integral(deltas.float(), self.num_bins) * stride
        return torch.cat((center - distances[..., :2], center + distances[..., 2:]), dim=-1)

    def _center_and_stride(self, anchors: Tensor):
        center = (anchors[..., :2] + anchors[..., 2:]) / 2
        return center, (anchors[..., 2:3] - anchors[..., :1]) / self.anchor_scale

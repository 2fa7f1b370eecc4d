"""Tensors in, tensors out: masks, losses, statistics, frozen layers, sums over GPUs."""

from .anchors import flatten_scalars, highest_logits
from .boxes import centerness_targets, decode_positives, iou_log_loss, paired_iou
from .distributed import gather_over_gpus, mean_over_gpus
from .divergence import box_distribution_kl, kl_divergence
from .focal import distribution_focal_loss, one_hot, quality_focal_kd, quality_focal_loss
from .frozen import FrozenLayers
from .graph import parameters_reached
from .masks import object_masks, valid_cells
from .precision import as_float, as_target
from .random import RandomStream
from .roi_align import SparseAlign
from .statistics import MAX_GAIN, channel_statistics, transfer_statistics

__all__ = [
    "FrozenLayers",
    "MAX_GAIN",
    "RandomStream",
    "SparseAlign",
    "as_float",
    "as_target",
    "box_distribution_kl",
    "centerness_targets",
    "channel_statistics",
    "decode_positives",
    "distribution_focal_loss",
    "flatten_scalars",
    "gather_over_gpus",
    "highest_logits",
    "iou_log_loss",
    "kl_divergence",
    "parameters_reached",
    "mean_over_gpus",
    "object_masks",
    "one_hot",
    "paired_iou",
    "quality_focal_kd",
    "quality_focal_loss",
    "transfer_statistics",
    "valid_cells",
]

"""The head of ATSS, GFL and the FCOS of the papers.

Shapes: N images, C channels, (h, w) the size of an FPN level, K classes.
"""

from typing import Dict, List, Optional, Tuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn


class ScaledHead(RetinaNetHead):
    """Detectron2's ``RetinaNetHead`` with one prediction per location, a learnable scale per FPN
    level on the box predictions, and optionally a centerness.

    Attributes:
        cls_subnet, bbox_subnet: the towers, flat sequences of conv, (norm), ReLU.
        cls_score, bbox_pred, ctrness: the prediction convs.
        scales: (L,), one factor per level, 1 at first.
    """

    def __init__(
        self,
        *,
        input_shape: List[ShapeSpec],
        box_dim: int = 4,
        centerness_branch: Optional[str] = None,
        **kwargs,
    ):
        """
        Args:
            input_shape: of the levels, finest first.
            box_dim: numbers that describe a box.
            centerness_branch: "cls" or "bbox", the tower that predicts centerness; None for none.
            kwargs: num_classes, conv_dims, norm and prior_prob as in ``RetinaNetHead``.
        """
        super().__init__(input_shape=input_shape, num_anchors=1, **kwargs)
        self.centerness_branch = centerness_branch
        channels = self.cls_score.in_channels
        if box_dim != self.bbox_pred.out_channels:
            self.bbox_pred = _prediction_conv(channels, box_dim)
        if centerness_branch is not None:
            self.ctrness = _prediction_conv(channels, 1)
        self.scales = nn.Parameter(torch.ones(len(input_shape)))

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], ...]:
        """
        Args:
            features: one tensor (N, C, h, w) per level, finest first.

        Returns:
            logits (N, K, h, w), deltas (N, box_dim, h, w) and, if there is a centerness branch,
            centerness (N, 1, h, w), each a list with one tensor per level.
        """
        assert len(features) == len(self.scales), "one feature map per level of input_shape"
        per_level = [
            {
                **self.predict("cls", self.cls_subnet(x), level),
                **self.predict("bbox", self.bbox_subnet(x), level),
            }
            for level, x in enumerate(features)
        ]
        names = ("logits", "deltas", "centerness")
        return tuple([p[name] for p in per_level] for name in names if name in per_level[0])

    def predict(self, branch: str, tower: Tensor, level: int) -> Dict[str, Tensor]:
        """The prediction convs of one branch.

        Args:
            branch: "cls" or "bbox".
            tower: (N, C, h, w), the last feature of this branch's tower.
            level: index of the FPN level, finest 0.

        Returns:
            "logits" (N, K, h, w) of the class branch, "deltas" (N, box_dim, h, w) of the box
            branch, and "centerness" (N, 1, h, w) of the branch that has it.
        """
        if branch == "cls":
            outputs = {"logits": self.cls_score(tower)}
        else:
            # Boxes in half precision would be whole pixels off.
            outputs = {"deltas": self.scales[level] * self.bbox_pred(tower).float()}
        if branch == self.centerness_branch:
            outputs["centerness"] = self.ctrness(tower)
        return outputs


def _prediction_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv

"""Stages of Detectron2's ResNets before the ReLU that ends them."""

from typing import Callable, Dict

from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, DeformBottleneckBlock
from torch import nn

_BLOCKS = (BasicBlock, BottleneckBlock, DeformBottleneckBlock)


class _Handles(list):
    def remove(self) -> None:
        for handle in self:
            handle.remove()


class ResidualSum:
    """What a residual block adds up before its last ReLU, to be observed as a module's output is.

    The block adds and rectifies in place, so nothing of the sum is left when it ends. It is made
    once more from the outputs of the two branches, at the cost of one map: no layer runs twice.

    Attributes:
        hooked: the layers whose hooks make it.
    """

    def __init__(self, block: nn.Module):
        self._block = block
        branch = getattr(block, "conv3", block.conv2)
        # In this order they run: the block's input is that of conv1, the projection comes last.
        self.hooked = (block.conv1, branch) if block.shortcut is None else (branch, block.shortcut)

    def register_forward_hook(self, hook: Callable) -> _Handles:
        """
        Args:
            hook: called as a module's hook is, with None for the inputs and (N, C, h, w).

        Returns:
            what ``remove()`` takes the hook away with.
        """
        block = self._block
        other = []

        def keep(module, inputs, output):
            other.append(inputs[0] if module is block.conv1 else output)

        def add(module, inputs, output):
            hook(block, None, other.pop() + output)

        first, second = self.hooked
        return _Handles([first.register_forward_hook(keep), second.register_forward_hook(add)])


def residual_sums(backbone: nn.Module) -> Dict[str, ResidualSum]:
    """What there is to observe before the last ReLU of each stage that a backbone gives out.

    Args:
        backbone: the part below the FPN.

    Returns:
        by stage; none for stages that do not end in a residual block of Detectron2's ResNets.
    """
    if not isinstance(backbone, ResNet):
        return {}
    last = {name: getattr(backbone, name)[-1] for name in backbone.stage_names}
    given = backbone.output_shape()
    return {n: ResidualSum(b) for n, b in last.items() if n in given and isinstance(b, _BLOCKS)}

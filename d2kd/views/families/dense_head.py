"""How a dense head is taken apart: its predictions, its towers, and the rest of a tower."""

from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, nn

BRANCHES = ("cls", "bbox")


class DensePredictions(NamedTuple):
    """Raw predictions of a dense head, one tensor per FPN level, finest first. A view gives None
    for what no method reads."""

    logits: Optional[List[Tensor]] = None  # (N, A·K, h, w)
    deltas: Optional[List[Tensor]] = None  # (N, A·R, h, w), R numbers per box
    centerness: Optional[List[Tensor]] = None  # (N, A, h, w)


class DenseHead:
    """A head that predicts classes and boxes at every location of every FPN level.

    Attributes:
        module: the head.
        num_anchors: A, anchors per location.
        num_classes: K; 1 for an RPN.
        class_agnostic: whether its one class is any object, as an RPN's.
        box_coding: how boxes are coded, for messages.
        outputs: which of :class:`DensePredictions` it gives.
    """

    outputs: Tuple[str, ...] = ("logits", "deltas")
    class_agnostic = False
    # The branch whose tower each of DensePredictions comes from, of heads with towers
    branch_of: Dict[str, str] = {}

    def __init__(self, module: nn.Module, num_anchors: int, num_classes: int, box_coding: object):
        self.module = module
        self.num_anchors = num_anchors
        self.num_classes = num_classes
        weights = getattr(box_coding, "weights", None)
        self.box_coding = type(box_coding).__name__ + (f" {tuple(weights)}" if weights else "")

    def predictions(self, outputs: Sequence[List[Tensor]]) -> DensePredictions:
        """Names what the head's forward returned."""
        return DensePredictions(*outputs)

    def num_blocks(self, branch: str) -> int:
        """Blocks (conv, norm, activation) of a branch's tower."""
        return 0

    @property
    def largest_parts(self) -> List[nn.Module]:
        """What runs as a module whatever is asked of the head."""
        return [self.module]

    def block(self, branch: str, depth: int, pre_activation: bool) -> nn.Module:
        """The module that gives the tower after ``depth`` blocks, 1 ... ``num_blocks(branch)``."""
        raise NotImplementedError(f"{type(self).__name__} has no towers")


class TowerHead(DenseHead):
    """A head like Detectron2's ``RetinaNetHead``: a flat ``Sequential`` per branch, shared by all
    levels, and one prediction conv per output."""

    TOWERS = {"cls": "cls_subnet", "bbox": "bbox_subnet"}
    PREDICTORS = {"cls": "cls_score", "bbox": "bbox_pred"}

    @property
    def outputs(self) -> Tuple[str, ...]:
        more = ("centerness",) if hasattr(self.module, "ctrness") else ()
        return (*super().outputs, *more)

    @property
    def branch_of(self) -> Dict[str, str]:
        # Detectron2's FCOS has the centerness on the box tower.
        centerness = getattr(self.module, "centerness_branch", "bbox")
        branches = {"logits": "cls", "deltas": "bbox", "centerness": centerness}
        return {name: branches[name] for name in self.outputs}

    @property
    def box_dim(self) -> int:
        """Numbers that describe one box: 4, or 4 distributions."""
        return self.module.bbox_pred.out_channels // self.num_anchors

    @property
    def largest_parts(self) -> List[nn.Module]:
        return [self.tower(branch) for branch in BRANCHES]

    def tower(self, branch: str) -> nn.Sequential:
        return getattr(self.module, self.TOWERS[branch])

    def _block_starts(self, branch: str) -> List[int]:
        # A block reaches from one convolution to the next, whatever norm and activation it has.
        return [i for i, m in enumerate(self.tower(branch)) if isinstance(m, nn.Conv2d)]

    def num_blocks(self, branch: str) -> int:
        return len(self._block_starts(branch))

    def block(self, branch: str, depth: int, pre_activation: bool) -> nn.Module:
        tower = self.tower(branch)
        end = [*self._block_starts(branch)[1:], len(tower)][depth - 1]
        return tower[end - 2] if pre_activation else tower[end - 1]

    def channels(self, branch: str, depth: int) -> int:
        """Channels of the tower after ``depth`` blocks, 0 ... ``num_blocks(branch)``."""
        convs = [self.tower(branch)[i] for i in self._block_starts(branch)]
        convs.append(getattr(self.module, self.PREDICTORS[branch]))
        return convs[depth].in_channels

    def resume(
        self, branch: str, depth: int, features: Iterable[Tensor]
    ) -> Dict[str, List[Tensor]]:
        """Runs the rest of a branch: the tower from block ``depth`` on, and the prediction convs.

        Args:
            branch: "cls" or "bbox".
            depth: how many blocks the features have passed, 0 ... ``num_blocks(branch)``.
            features: one tensor (N, C, h, w) per level, all levels of this head, finest first;
                read one at a time.

        Returns:
            "logits" of the class branch, "deltas" of the box branch, "centerness" of the branch
            that has it; per level as in :class:`DensePredictions`.
        """
        starts = [*self._block_starts(branch), len(self.tower(branch))]
        # A whole tower runs as the module that it is, which may be compiled. What is left of one
        # runs layer by layer: as a module it would hold the features to the end.
        layers = self.tower(branch)[starts[depth] :] if depth else [self.tower(branch)]
        per_level = []
        for x in features:
            for layer in layers:
                x = layer(x)
            per_level.append(self.predict(branch, x, len(per_level)))
        return {name: [p[name] for p in per_level] for name in per_level[0]}

    def predict(self, branch: str, tower: Tensor, level: int) -> Dict[str, Tensor]:
        """The prediction convs of a branch on the last tower feature of one level."""
        if hasattr(self.module, "predict"):  # the heads of d2kd.modeling.meta_arch
            return self.module.predict(branch, tower, level)
        if branch == "cls":
            return {"logits": self.module.cls_score(tower)}
        outputs = {"deltas": self.module.bbox_pred(tower)}
        if "centerness" in self.outputs:
            outputs["centerness"] = self.module.ctrness(tower)
        return outputs

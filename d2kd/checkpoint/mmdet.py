"""MMDetection's state dicts (2.x and 3.x) as Detectron2's.

RetinaNet, FCOS (as ``PaperFCOS``), ATSS, GFL, Faster, Mask and Cascade R-CNN on ResNets of either
style with an FPN. Three values change: the order of RetinaNet's anchors; the scales of the levels,
which are one tensor here; the biases of convolutions before GroupNorm, which are zeros here and
absent there. FrozenBatchNorm2d holds BatchNorm's four tensors with the same eps, so nothing is
folded.
"""

import re
from dataclasses import dataclass, field
from typing import Dict, Iterable, Mapping, Optional

import torch
from torch import Tensor

from .files import Unreadable
from .mmdet_config import anchor_counts
from .mmdet_names import translate

_HEADS = ("neck.", "bbox_head.", "rpn_head.", "roi_head.")
# What training wrappers put before the detector's names: CrossKD and LD put nothing, MMRazor, FGD
# and semi-supervised detectors some of these, DistributedDataParallel the first one before them.
_PARALLEL = "module."
_STUDENTS = ("student.", "architecture.")
_WRAPPERS = (_PARALLEL, *_STUDENTS, "model.", "detector.")
_LEFT_OUT = {
    r".*\.num_batches_tracked": "counts steps of training",
    r"bbox_head\.integral\.project": "the numbers 0, 1, 2, ...",
    r"(.*\.)?loss_\w+\..*": "of a loss",
    # MMCV's hook has changed places with it: the parameters are the average
    r"ema_\w+": "kept beside the moving average",
    r"(teacher|teacher_model|distiller)\..*": "not the student's",
}
_SCALE = re.compile(r"bbox_head\.scales\.(\d{1,2})\.scale")
# Heads whose outputs stand by anchor: in the file's config, what their names have, and which of
# them, by Detectron2's name, are the boxes
_ANCHORED = (
    ("bbox_head", re.compile(r"\.retina_(cls|reg)\."), "head.bbox_pred.weight"),
    (
        "rpn_head",
        re.compile(r"rpn_head\.rpn_(cls|reg)\."),
        "proposal_generator.rpn_head.anchor_deltas.weight",
    ),
)
_TOWER_WEIGHT = re.compile(r"head\.(cls|bbox)_subnet\.\d+\.weight")


@dataclass
class Converted:
    """A state dict with Detectron2's names.

    Attributes:
        tensors: by Detectron2's names; what no rule knows keeps its own.
        sources: Detectron2's name -> MMDetection's, None for the zeros of absent biases.
        left_out: MMDetection's name -> why it is not needed.
    """

    tensors: Dict[str, Tensor] = field(default_factory=dict)
    sources: Dict[str, Optional[str]] = field(default_factory=dict)
    left_out: Dict[str, str] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor, source: Optional[str]) -> None:
        self.tensors[name], self.sources[name] = tensor, source


def is_mmdet(names: Iterable) -> bool:
    """Whether the names of a state dict are those of a detector of MMDetection."""
    return any(isinstance(name, str) and _strip(name).startswith(_HEADS) for name in names)


def convert(state: Mapping[str, Tensor], meta: Optional[Mapping] = None) -> Converted:
    """
    Args:
        state: MMDetection's state dict, not changed.
        meta: what the file says of itself, for RetinaNets with unusual anchors.

    Returns:
        the same for Detectron2. Every name of ``state`` is among the sources or left out.

    Raises:
        Unreadable: for a backbone that d2kd lacks, classes in MMDetection 1.x's order, or anchors
            whose order cannot be known.
    """
    result = Converted()
    names = _detector_names(state, result.left_out)
    _refuse_backbones(names)
    _refuse_background_first({name: state[source] for name, source in names.items()})
    targets = translate(names)
    for name, source in names.items():
        if not _SCALE.fullmatch(name):
            target = targets.get(name, source)
            taken = target in result.tensors
            result.add(source if taken else target, state[source], source)
    _reorder_anchors(result, meta)
    _stack_scales(names, state, result)
    _add_zero_biases(result)
    return result


def _strip(name: str) -> str:
    wrapper = next((w for w in _WRAPPERS if name.startswith(w)), None)
    return name if wrapper is None else _strip(name[len(wrapper) :])


def _detector_names(state: Mapping[str, Tensor], left_out: Dict[str, str]) -> Dict[str, str]:
    """The names of the detector's parameters -> how the file calls them."""
    inner = {x: x[len(_PARALLEL) :] if x.startswith(_PARALLEL) else x for x in state}
    wrapped = any(name.startswith(_STUDENTS) for name in inner.values())
    names = {}
    for source, full in inner.items():
        name = _strip(full)
        reason = next((why for x, why in _LEFT_OUT.items() if re.fullmatch(x, name)), None)
        if reason is None and wrapped and name == full:
            reason = "not the student's"
        if reason is None:
            names[name] = source
        else:
            left_out[source] = reason
    return names


def _refuse_backbones(names: Iterable[str]) -> None:
    for name in names:
        if name == "backbone.patch_embed.projection.weight":
            raise Unreadable(
                "its backbone is MMDetection's Swin, which neither Detectron2 0.6 nor timm "
                "computes (norms of the outputs, shifted windows in the last stage, padding before "
                "the shift): take a teacher with a ResNet"
            )
        if ".conv_offset." in name:
            raise Unreadable(
                f"has deformable convolutions ({name}), which are not translated: take a teacher "
                "without them"
            )


def _refuse_background_first(state: Mapping[str, Tensor]) -> None:
    """In two-stage detectors of MMDetection 1.x the background is the first class, and boxes are
    predicted for it, too. What ``meta`` says of the version does not decide: files of 2.0's model
    zoo call themselves 1.0rc1."""
    for name, scores in state.items():
        box_head, is_scores, _ = name.partition("fc_cls.weight")
        boxes = state.get(f"{box_head}fc_reg.weight")
        of_1_x = name.startswith("bbox_head.") or (
            boxes is not None and len(boxes) == 4 * len(scores)
        )
        if is_scores and of_1_x:
            raise Unreadable(
                f"is of MMDetection 1.x, where the background is the first class ({name}): turn it "
                "into one of 2.0 with MMDetection's tools/model_converters/upgrade_model_version.py"
            )


def _reorder_anchors(result: Converted, meta: Optional[Mapping]) -> None:
    """RetinaNet's head and the RPN: MMDetection's anchors stand by ratio, then scale; Detectron2's
    by scale, then ratio. Output channels (ratio, scale, d) -> (scale, ratio, d)."""
    for head, outputs, boxes in _ANCHORED:
        names = [n for n, source in result.sources.items() if source and outputs.search(source)]
        if boxes not in result.tensors or not names:
            continue
        ratios, scales = anchor_counts(meta, len(result.tensors[boxes]) // 4, head)
        for name in names:
            by_ratio = result.tensors[name].unflatten(0, (ratios, scales, -1))
            result.tensors[name] = by_ratio.transpose(0, 1).flatten(0, 2)


def _stack_scales(names: Mapping[str, str], state: Mapping[str, Tensor], result: Converted) -> None:
    """The learned scale of each FPN level: () each -> (L,)."""
    levels = sorted(int(m[1]) for m in map(_SCALE.fullmatch, names) if m)
    if levels:
        sources = [names[f"bbox_head.scales.{level}.scale"] for level in levels]
        for source in sources:
            if getattr(state[source], "shape", None) not in ((), (1,)):
                raise Unreadable(f"its '{source}' is not one number in a tensor")
        scales = torch.stack([state[source].reshape(()) for source in sources])
        result.add("head.scales", scales, ", ".join(sources))


def _add_zero_biases(result: Converted) -> None:
    """Convolutions before GroupNorm have no bias in MMDetection, but in Detectron2's heads."""
    weights = {n: x for n, x in result.tensors.items() if _TOWER_WEIGHT.fullmatch(n)}
    convs = [n[: -len(".weight")] for n, x in weights.items() if x.dim() == 4]
    with_norm = len(convs) < len(weights)
    if with_norm and not any(f"{conv}.bias" in result.tensors for conv in convs):
        for conv in convs:
            result.add(f"{conv}.bias", torch.zeros(len(weights[f"{conv}.weight"])), None)

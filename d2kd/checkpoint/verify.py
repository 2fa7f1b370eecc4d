"""Proof that a detector is what its weights were trained for: filled tensors show neither pixels
nor strides nor classes."""

import math
from typing import Any, List, Mapping, Optional, Sequence

from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from d2kd.data.classes import plain_name
from d2kd.errors import UserError
from d2kd.modeling.backbone.fpn import LastLevelP6P7WithoutReLU
from d2kd.modeling.meta_arch import PaperFCOS
from d2kd.views import Family, find_family

from . import mmdet_settings as names
from .mmdet_settings import Settings, file_settings

# What the pair report says, for the settings that it sums up
_WORDS = {
    "pixels": (names.FORMAT, names.MEAN, names.STD),
    "strides": (names.STRIDE,),
    "P6 and P7": (names.P6, names.RELU),
    "boxes": (names.BOX_WEIGHTS, names.SIZES, names.RATIOS, names.FCOS_OPTIONS),
    "classes": (names.CLASSES,),
}


def verify(
    meta: Optional[Mapping],
    detector: nn.Module,
    source: str,
    input_format: Optional[str] = None,
    class_names: Sequence[str] = (),
    compared_by: Optional[Sequence[str]] = None,
) -> str:
    """
    Args:
        meta: what the file of the weights says of itself; None for files that say nothing, as
            Detectron2's do.
        detector: what was filled.
        source: config key and file, for the message.
        input_format: ``INPUT.FORMAT`` of the detector's config.
        class_names: of the data, in order, if known.
        compared_by: of a teacher, the config keys of the losses that compare its classes with the
            student's; if there are none, it may have others.

    Returns:
        for the pair report: "verified", or "unverified", and what.

    Raises:
        UserError: naming every difference between the file and the detector, and what to set.
    """
    wanted = file_settings(meta)
    found = detector_settings(detector, input_format, class_names) if wanted else {}
    both = [name for name in wanted if name in found]
    different = {
        name: _difference(name, wanted[name], found[name])
        for name in both
        if not _same(wanted[name], found[name])
    }
    others = ""
    if names.CLASSES in different and compared_by is not None and not compared_by:
        both.remove(names.CLASSES)
        others = different.pop(names.CLASSES)
    if different:
        advice = _advice(compared_by) if names.CLASSES in different and compared_by else ""
        raise UserError(
            f"{source}: the file was trained with other settings than the detector has: "
            f"{'; '.join(different.values())}{advice}"
        )
    return _verdict(both, others)


def _advice(compared_by: Sequence[str]) -> str:
    return (
        f"; they have to be the same for {', '.join(compared_by)}: take a teacher of the data's "
        "classes in their order, fine-tune it on the data (d2kd train --finetune-teacher), or set "
        "that to 0"
    )


def _verdict(compared: Sequence[str], other_classes: str) -> str:
    """
    Args:
        compared: the settings that were compared, and are the same.
        other_classes: what differs in the classes, if that does not matter.
    """
    verified = [word for word, its in _WORDS.items() if any(name in compared for name in its)]
    unverified = [word for word in ("pixels", "classes") if word not in verified]
    parts = {"verified": verified, "unverified": unverified}
    if other_classes:
        unverified.remove("classes")
        parts["other classes, which no loss compares"] = [other_classes]
    elif not verified:
        return "unverified: the file does not say what it was trained with"
    return "; ".join(f"{part}: {', '.join(words)}" for part, words in parts.items() if words)


def detector_settings(
    detector: nn.Module, input_format: Optional[str] = None, class_names: Sequence[str] = ()
) -> Settings:
    """
    Args:
        detector: what its family says of it counts, where there is one.
        input_format: ``INPUT.FORMAT`` of its config.
        class_names: that it learns, if known.

    Returns:
        its settings, named as those of a file; what it has nothing of is missing.
    """
    family = find_family(detector) or Family(detector)
    settings: Settings = {
        names.MEAN: [round(x, 4) for x in family.pixels.mean],
        names.STD: [round(x, 4) for x in family.pixels.std],
        **_backbone_settings(family),
        **_anchor_settings(detector),
    }
    if input_format:
        settings[names.FORMAT] = input_format
    if class_names:
        settings[names.CLASSES] = list(class_names)
    if isinstance(detector, PaperFCOS):
        settings[names.FCOS_OPTIONS] = []
    coders = [getattr(x, "box2box_transform", None) for x in (detector, *_box_predictors(detector))]
    weights = [list(x.weights) for x in coders if hasattr(x, "weights")]
    return {**settings, names.BOX_WEIGHTS: weights} if weights else settings


def _box_predictors(detector: nn.Module) -> Sequence[nn.Module]:
    predictor = getattr(getattr(detector, "roi_heads", None), "box_predictor", None)
    return predictor if isinstance(predictor, nn.ModuleList) else [predictor]


def _backbone_settings(family: Family) -> Settings:
    settings: Settings = {}
    blocks = getattr(family.stage_module, "res3", None)
    if isinstance(blocks, nn.Sequential) and hasattr(blocks[0], "conv3"):
        settings[names.STRIDE] = blocks[0].conv1.stride[0] == 2
    top_block = getattr(family.backbone, "top_block", None)
    if isinstance(top_block, LastLevelP6P7):
        from_res5 = top_block.in_feature == "res5"
        settings[names.P6] = names.FROM_RES5 if from_res5 else names.FROM_P5
        settings[names.RELU] = not isinstance(top_block, LastLevelP6P7WithoutReLU)
    elif isinstance(top_block, LastLevelMaxPool):
        settings[names.P6] = names.POOLED
    return settings


def _anchor_settings(detector: nn.Module) -> Settings:
    rpn = getattr(detector, "proposal_generator", None)
    generator = getattr(rpn or detector, "anchor_generator", None)
    if generator is None:
        return {}
    width, height = zip(*((x[:, 2:] - x[:, :2]).unbind(dim=1) for x in generator.cell_anchors))
    sizes = [[round(s, 3) for s in (w * h).sqrt().tolist()] for w, h in zip(width, height)]
    ratios = [round(r, 4) for w, h in zip(width, height) for r in (h / w).tolist()]
    # In their order, which is that of the channels
    return {names.SIZES: [_distinct(x) for x in sizes], names.RATIOS: _distinct(ratios)}


def _distinct(values: Sequence[float]) -> List[float]:
    return list(dict.fromkeys(values))


def _same(a: Any, b: Any) -> bool:
    """Equal, numbers within 0.1 % and class names whatever their case and spaces."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, str) and isinstance(b, str):
        return plain_name(a) == plain_name(b)
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-3)
    return a == b


def _difference(name: str, wanted: Any, found: Any) -> str:
    if name == names.CLASSES and len(wanted) == len(found):
        i = next(i for i, pair in enumerate(zip(wanted, found)) if not _same(*pair))
        return f"class {i} is '{found[i]}' in the data, '{wanted[i]}' in the file"
    if name == names.CLASSES:
        return f"the data have {len(found)} classes, the file {len(wanted)}"
    return f"{name} is {found!r}, in the file {wanted!r}"

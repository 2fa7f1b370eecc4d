"""Proof that a detector is what its weights were trained for: filled tensors show neither pixels
nor strides nor classes."""

import math
from typing import Any, Dict, List, Mapping, Optional, Sequence

from detectron2.layers import ROIAlign
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import nn

from d2kd.data.classes import plain_name
from d2kd.errors import UserError
from d2kd.modeling.backbone.fpn import LastLevelP6P7WithoutReLU
from d2kd.modeling.meta_arch import ATSS, PaperFCOS
from d2kd.views import Family, any_family

from . import mmdet_settings as names
from .mmdet_settings import Settings, file_settings

# What the pair report says, for the settings that it sums up
_WORDS = {
    "pixels": (names.FORMAT, names.MEAN, names.STD),
    "strides": (names.STRIDE, names.RES5_STRIDE, names.DILATION),
    "FPN": (names.P6, names.RELU, names.UPSAMPLING),
    "head": (names.GROUPS, names.FCOS_OPTIONS),
    "anchors": (names.SIZES, names.RATIOS, names.OFFSET, names.GENERATOR),
    "boxes": (names.CODERS, names.MEANS, names.BOX_WEIGHTS, names.RPN_WEIGHTS),
    "regions": (names.POOLER, names.SAMPLING),
    "classes": (names.CLASSES,),
}
_ALWAYS = ("pixels", "classes")  # are said to be unverified where a file does not tell them


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
    different = _differences(wanted, found, detector)
    others = ""
    if names.CLASSES in different and compared_by is not None and not compared_by:
        others = different.pop(names.CLASSES)
    if different:
        advice = _advice(compared_by) if names.CLASSES in different and compared_by else ""
        raise UserError(f"{source}: {_told(different)}{advice}")
    return _verdict(wanted, found, others)


def other_settings(
    meta: Optional[Mapping], detector: nn.Module, input_format: Optional[str] = None
) -> str:
    """
    Args:
        meta, detector, input_format: see :func:`verify`.

    Returns:
        every difference between the file and the detector but that of classes; empty if there is
        none.
    """
    wanted = file_settings(meta)
    found = detector_settings(detector, input_format) if wanted else {}
    different = _differences(wanted, found, detector)
    return _told(different) if different else ""


def _differences(wanted: Settings, found: Settings, detector: nn.Module) -> Dict[str, str]:
    keys = {names.BOX_WEIGHTS: _key_of_box_weights(detector)}
    return {
        name: _difference(keys.get(name, name), wanted[name], found[name])
        for name in wanted
        if name in found and not _same(wanted[name], found[name])
    }


def _key_of_box_weights(detector: nn.Module) -> str:
    section = "ATSS" if isinstance(detector, ATSS) else "RETINANET"
    if hasattr(detector, "roi_heads"):
        is_cascade = len(_box_predictors(detector)) > 1
        section = "ROI_BOX_CASCADE_HEAD" if is_cascade else "ROI_BOX_HEAD"
    return f"MODEL.{section}.{names.BOX_WEIGHTS}"


def _told(different: Mapping[str, str]) -> str:
    """What differs, and what to do about what is no class."""
    fixed = [name for name in different if name in names.FIXED]
    if fixed:
        advice = f"; no key sets the {' and the '.join(fixed)}: give another file"
    else:
        advice = "" if [*different] == [names.CLASSES] else "; set the keys as in the file"
    return (
        "the file was trained with other settings than the detector has: "
        f"{'; '.join(different.values())}{advice}"
    )


def _advice(compared_by: Sequence[str]) -> str:
    return (
        f"; they have to be the same for {', '.join(compared_by)}: take a teacher of the data's "
        "classes in their order, fine-tune it on the data (d2kd train --finetune-teacher), or set "
        "that to 0"
    )


def _verdict(wanted: Settings, found: Settings, other_classes: str) -> str:
    """
    Args:
        wanted, found: the settings of a file and a detector, the same as far as both are known.
        other_classes: what differs in the classes, if that does not matter.
    """
    verified, unverified = [], []
    has_config = any(name != names.CLASSES for name in wanted)
    for word, settings in _WORDS.items():
        of_detector = [name for name in settings if name in found]
        if of_detector and all(name in wanted for name in of_detector):
            verified.append(word)
        elif word in _ALWAYS or (of_detector and has_config):
            unverified.append(word)
    if other_classes:
        verified.remove("classes")
    elif not verified:
        return "unverified: the file does not say what it was trained with"
    parts = {"verified": verified, "unverified": unverified}
    if other_classes:
        parts["other classes, which no loss compares"] = [other_classes]
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
    family = any_family(detector)
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
    return {**settings, **_head_settings(detector), **_coder_settings(detector)}


def _head_settings(detector: nn.Module) -> Settings:
    head = getattr(detector, "head", None)
    norms = [x for x in head.modules() if isinstance(x, nn.GroupNorm)] if head else []
    settings: Settings = {names.GROUPS: norms[0].num_groups} if norms else {}
    if isinstance(detector, PaperFCOS):
        settings[names.FCOS_OPTIONS] = []
    pooler = getattr(getattr(detector, "roi_heads", None), "box_pooler", None)
    layers = getattr(pooler, "level_poolers", None) or [None]
    if isinstance(layers[0], ROIAlign):
        settings[names.POOLER] = "ROIAlignV2" if layers[0].aligned else "ROIAlign"
        settings[names.SAMPLING] = layers[0].sampling_ratio
    return settings


def _coder_settings(detector: nn.Module) -> Settings:
    """How box deltas become boxes."""
    rpn = _coder(getattr(detector, "proposal_generator", None))
    coders = [_coder(x) for x in (detector, *_box_predictors(detector))]
    weights = [list(x.weights) for x in coders if x is not None]
    settings: Settings = {names.RPN_WEIGHTS: list(rpn.weights)} if rpn else {}
    if weights:
        settings[names.BOX_WEIGHTS] = names.one_or_all(weights)
    if settings:
        settings.update({names.CODERS: [names.DELTAS], names.MEANS: [0.0] * 4})
    return settings


def _coder(module: Optional[nn.Module]) -> Optional[Box2BoxTransform]:
    coder = getattr(module, "box2box_transform", None)
    return coder if isinstance(coder, Box2BoxTransform) else None


def _box_predictors(detector: nn.Module) -> Sequence[nn.Module]:
    predictor = getattr(getattr(detector, "roi_heads", None), "box_predictor", None)
    return predictor if isinstance(predictor, nn.ModuleList) else [predictor]


def _backbone_settings(family: Family) -> Settings:
    settings: Settings = {}
    blocks = getattr(family.stage_module, "res3", None)
    if isinstance(blocks, nn.Sequential) and hasattr(blocks[0], "conv3"):
        settings[names.STRIDE] = blocks[0].conv1.stride[0] == 2
    last = family.stage_module.output_shape().get("res5") if settings else None  # C4 has none here
    if last is not None:
        settings[names.RES5_STRIDE] = last.stride
        settings[names.DILATION] = family.stage_module.res5[0].conv2.dilation[0]
    if isinstance(family.backbone, FPN):
        settings[names.UPSAMPLING] = names.NEAREST
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
    if generator is None or isinstance(detector, PaperFCOS):  # whose anchors are points
        return {}
    width, height = zip(*((x[:, 2:] - x[:, :2]).unbind(dim=1) for x in generator.cell_anchors))
    sizes = [[round(s, 3) for s in (w * h).sqrt().tolist()] for w, h in zip(width, height)]
    ratios = [round(r, 4) for w, h in zip(width, height) for r in (h / w).tolist()]
    # In their order, which is that of the channels
    return {
        names.SIZES: [_distinct(x) for x in sizes],
        names.RATIOS: _distinct(ratios),
        names.OFFSET: generator.offset,
        names.GENERATOR: names.ANCHORS,
    }


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
    return f"{name} is {_shown(found)}, in the file {_shown(wanted)}"


def _shown(value: Any) -> str:
    """Numbers without the digits that nobody would write."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(round(value, 4) if isinstance(value, float) else value)

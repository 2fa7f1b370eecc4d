"""The names of MMDetection's parameters in Detectron2, as a table.

Left a pattern of MMDetection's name; right Detectron2's name, in which ``{0}`` is the pattern's
first group, ``{0:+3}`` that number plus 3, and ``{0:*3+1}`` three times it plus 1.
"""

import re
from typing import Iterable, List, Mapping, Tuple

Rules = List[Tuple[str, str]]

_RESNET: Rules = [
    (r"backbone\.conv1\.(weight|bias)", "backbone.bottom_up.stem.conv1.{0}"),
    (r"backbone\.bn1\.(\w+)", "backbone.bottom_up.stem.conv1.norm.{0}"),
    (
        r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.weight",
        "backbone.bottom_up.res{0:+1}.{1}.conv{2}.weight",
    ),
    (
        r"backbone\.layer(\d)\.(\d+)\.bn(\d)\.(\w+)",
        "backbone.bottom_up.res{0:+1}.{1}.conv{2}.norm.{3}",
    ),
    (
        r"backbone\.layer(\d)\.(\d+)\.downsample\.0\.weight",
        "backbone.bottom_up.res{0:+1}.{1}.shortcut.weight",
    ),
    (
        r"backbone\.layer(\d)\.(\d+)\.downsample\.1\.(\w+)",
        "backbone.bottom_up.res{0:+1}.{1}.shortcut.norm.{2}",
    ),
]

# Three lateral convolutions, from res3: P3 to P5, then P6 and P7
_DENSE_FPN: Rules = [
    (r"neck\.lateral_convs\.(\d)\.conv\.(\w+)", "backbone.fpn_lateral{0:+3}.{1}"),
    (r"neck\.lateral_convs\.(\d)\.(?:bn|gn)\.(\w+)", "backbone.fpn_lateral{0:+3}.norm.{1}"),
    (r"neck\.fpn_convs\.([012])\.conv\.(\w+)", "backbone.fpn_output{0:+3}.{1}"),
    (r"neck\.fpn_convs\.([012])\.(?:bn|gn)\.(\w+)", "backbone.fpn_output{0:+3}.norm.{1}"),
    (r"neck\.fpn_convs\.([34])\.conv\.(\w+)", "backbone.top_block.p{0:+3}.{1}"),
]
# Four, from res2: P2 to P5; P6 has no parameters, or is followed by P7
_TWO_STAGE_FPN: Rules = [
    (r"neck\.lateral_convs\.(\d)\.conv\.(\w+)", "backbone.fpn_lateral{0:+2}.{1}"),
    (r"neck\.lateral_convs\.(\d)\.(?:bn|gn)\.(\w+)", "backbone.fpn_lateral{0:+2}.norm.{1}"),
    (r"neck\.fpn_convs\.([0123])\.conv\.(\w+)", "backbone.fpn_output{0:+2}.{1}"),
    (r"neck\.fpn_convs\.([0123])\.(?:bn|gn)\.(\w+)", "backbone.fpn_output{0:+2}.norm.{1}"),
    (r"neck\.fpn_convs\.([45])\.conv\.(\w+)", "backbone.top_block.p{0:+2}.{1}"),
]

# Blocks of conv, ReLU
_PLAIN_TOWERS: Rules = [
    (r"bbox_head\.cls_convs\.(\d)\.conv\.(\w+)", "head.cls_subnet.{0:*2}.{1}"),
    (r"bbox_head\.reg_convs\.(\d)\.conv\.(\w+)", "head.bbox_subnet.{0:*2}.{1}"),
]
# Blocks of conv, GroupNorm, ReLU
_NORM_TOWERS: Rules = [
    (r"bbox_head\.cls_convs\.(\d)\.conv\.(\w+)", "head.cls_subnet.{0:*3}.{1}"),
    (r"bbox_head\.reg_convs\.(\d)\.conv\.(\w+)", "head.bbox_subnet.{0:*3}.{1}"),
    (r"bbox_head\.cls_convs\.(\d)\.gn\.(\w+)", "head.cls_subnet.{0:*3+1}.{1}"),
    (r"bbox_head\.reg_convs\.(\d)\.gn\.(\w+)", "head.bbox_subnet.{0:*3+1}.{1}"),
]
# FCOS: fcos_... until early 2020, conv_... since
_DENSE_HEAD: Rules = [
    (r"bbox_head\.(?:retina|conv|fcos|atss|gfl)_cls\.(\w+)", "head.cls_score.{0}"),
    (r"bbox_head\.(?:retina|conv|fcos|atss|gfl)_reg\.(\w+)", "head.bbox_pred.{0}"),
    (r"bbox_head\.(?:conv|fcos|atss)_centerness\.(\w+)", "head.ctrness.{0}"),
]

# In a Cascade R-CNN, the number of the stage stands after "bbox_head"
_BOX_HEAD = r"roi_head\.bbox_head(\.\d)?"
_TWO_STAGE: Rules = [
    (r"rpn_head\.rpn_conv\.(\w+)", "proposal_generator.rpn_head.conv.{0}"),
    (r"rpn_head\.rpn_cls\.(\w+)", "proposal_generator.rpn_head.objectness_logits.{0}"),
    (r"rpn_head\.rpn_reg\.(\w+)", "proposal_generator.rpn_head.anchor_deltas.{0}"),
    (_BOX_HEAD + r"\.shared_convs\.(\d)\.conv\.(\w+)", "roi_heads.box_head{0}.conv{1:+1}.{2}"),
    (_BOX_HEAD + r"\.shared_convs\.(\d)\.gn\.(\w+)", "roi_heads.box_head{0}.conv{1:+1}.norm.{2}"),
    (_BOX_HEAD + r"\.shared_fcs\.(\d)\.(\w+)", "roi_heads.box_head{0}.fc{1:+1}.{2}"),
    (_BOX_HEAD + r"\.fc_cls\.(\w+)", "roi_heads.box_predictor{0}.cls_score.{1}"),
    (_BOX_HEAD + r"\.fc_reg\.(\w+)", "roi_heads.box_predictor{0}.bbox_pred.{1}"),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv\.(\w+)", "roi_heads.mask_head.mask_fcn{0:+1}.{1}"),
    (r"roi_head\.mask_head\.convs\.(\d)\.gn\.(\w+)", "roi_heads.mask_head.mask_fcn{0:+1}.norm.{1}"),
    (r"roi_head\.mask_head\.upsample\.(\w+)", "roi_heads.mask_head.deconv.{0}"),
    (r"roi_head\.mask_head\.conv_logits\.(\w+)", "roi_heads.mask_head.predictor.{0}"),
]


def translate(names: Iterable[str]) -> Mapping[str, str]:
    """
    Args:
        names: of a detector of MMDetection, all of them.

    Returns:
        Detectron2's name of each; names that no rule knows are missing.
    """
    names = list(names)
    laterals = sum(
        x.startswith("neck.lateral_convs.") and x.endswith(".conv.weight") for x in names
    )
    with_norm = any(x.startswith("bbox_head.") and ".gn." in x for x in names)
    rules = [
        *_RESNET,
        *(_DENSE_FPN if laterals == 3 else _TWO_STAGE_FPN),
        *(_NORM_TOWERS if with_norm else _PLAIN_TOWERS),
        *_DENSE_HEAD,
        *_TWO_STAGE,
    ]
    found = ((x, next(filter(None, (_apply(x, *rule) for rule in rules)), None)) for x in names)
    return {x: translated for x, translated in found if translated is not None}


def _apply(name: str, pattern: str, template: str):
    match = re.fullmatch(pattern, name)
    if match is None:
        return None
    return template.format(*(_Number(x) if x and x.isdigit() else x or "" for x in match.groups()))


class _Number(int):
    """A number in a name, which a template can multiply and add to."""

    def __format__(self, spec: str) -> str:
        times, plus = re.fullmatch(r"(?:\*(\d))?(?:\+(\d))?", spec).groups()
        return str(self * int(times or 1) + int(plus or 0))

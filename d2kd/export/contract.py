"""What a program expects and returns, written into its file."""

import json
from typing import Any, Dict, Sequence

import detectron2
from detectron2.config import CfgNode
from torch import nn

from d2kd import __version__
from d2kd.errors import UserError
from d2kd.views import any_family

_RESIZED = (
    "resized so that its shorter side has min_size pixels, or its longer side max_size if that "
    "would be exceeded (bilinear; min_size 0: not resized)"
)
_PIXELS = "float32, 0 to 255, channels in the order of input_format"
_INSIDE = "the program subtracts pixel_mean, divides by pixel_std"
_OUTPUTS = {
    "boxes": "(N, 4) float32: x1, y1, x2, y2 in pixels of the input",
    "classes": "(N,) int64: index into the class names",
    "scores": "(N,) float32, highest first",
    "masks": "(N, 28, 28) float32: probability of the object, over the area of the box",
}


def input_contract(student: nn.Module, cfg: CfgNode, classes: Sequence[str]) -> Dict[str, Any]:
    """What is true of every program of a student.

    Args:
        student: the student.
        cfg: its config.
        classes: its names, in order; may be unknown.

    Raises:
        UserError: if the student does not keep how its pixels are normalised.
    """
    if not hasattr(student, "pixel_mean"):
        raise UserError(
            f"MODEL.META_ARCHITECTURE '{type(student).__name__}' cannot be exported: it has no "
            "pixel_mean and pixel_std, which its program would tell"
        )
    pixels = any_family(student).pixels
    return {
        "architecture": type(student).__name__,
        "classes": list(classes),
        "input_format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "pixel_mean": list(pixels.mean),
        "pixel_std": list(pixels.std),
        "d2kd": __version__,
        "detectron2": detectron2.__version__,
    }


def image_of_any_size() -> Dict[str, Any]:
    """The input of a whole detector."""
    return {"input": f"image: (C, H, W), {_PIXELS}, {_RESIZED}; {_INSIDE} and pads"}


def image_of_fixed_size(height: int, width: int) -> Dict[str, Any]:
    """The input of a whole detector that is made for one size."""
    return {
        "input": f"image: (C, {height}, {width}), {_PIXELS}; {_INSIDE} and pads",
        "fixed_size": [height, width],
    }


def batch(divisor: int) -> Dict[str, Any]:
    """The input of bare heads."""
    return {
        "input": f"images: (N, C, H, W), {_PIXELS}, {_RESIZED}, and padded with pixel_mean at the "
        f"right and at the bottom to multiples of {divisor}; {_INSIDE}",
        "size_divisibility": divisor,
    }


def outputs(names: Sequence[str]) -> Dict[str, str]:
    """What the outputs of a whole detector mean."""
    return {name: _OUTPUTS[name] for name in names}


def as_text(metadata: Dict[str, Any]) -> Dict[str, str]:
    """Each value as text; what is no text yet, as JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}

"""The images on which a program is compared with its detector."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
from torch import Tensor

from d2kd.prediction import Predictor, as_input

# Photographs that are looked at, at most
MAX_PHOTOGRAPHS = 4
# Of a small image: fewer places on every FPN level than a level may have candidates
_SMALL = 64


class Size(NamedTuple):
    """Of an image."""

    height: int
    width: int


def trial_images(
    predictor: Predictor, paths: Sequence[str], fixed_size: Optional[Size]
) -> List[Tensor]:
    """Photographs as the detector gets them in a test; of the first one also its upper half, that
    half on its side, and a small version; an image of one colour. With a fixed size, all are of it.

    Args:
        predictor: reads and resizes for the test.
        paths: photographs.
        fixed_size: what the program is made for, or None.

    Returns:
        (C, H, W) float32 each, in the detector's channel order.

    Raises:
        UserError: if one of the files is no image.
    """
    photographs = [predictor.read(path) for path in paths[:MAX_PHOTOGRAPHS]]
    if fixed_size:
        plain = np.full_like(photographs[0], 128)
        return [as_input(_resized(x, fixed_size)) for x in [*photographs, plain]]
    images = [predictor.network_input(x)["image"] for x in photographs]
    first = images[0]
    height, width = _scaled(first.shape[-2:], _SMALL)
    small = as_input(_resized(photographs[0], Size(height, width)))
    wide = first[:, : first.shape[1] // 2].contiguous()
    tall = wide.transpose(1, 2).contiguous()
    return [*images, wide, tall, small, first.new_full(first.shape, 128.0)]


def _resized(image: np.ndarray, size: Size) -> np.ndarray:
    resized = cv2.resize(image, (size.width, size.height), interpolation=cv2.INTER_AREA)
    return resized.reshape(size.height, size.width, -1)


def _scaled(size: Sequence[int], shortest: int) -> Tuple[int, int]:
    height, width = (round(side * shortest / min(size)) for side in size)
    return height, width

"""From an image to detections in its pixels."""

from typing import Any, Dict

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import Tensor, nn

from d2kd.errors import UserError

from .images import read_image


def as_input(image: np.ndarray) -> Tensor:
    """(H, W, C) of any type -> (C, H, W) float32, as a detector takes it."""
    return torch.as_tensor(image.astype("float32").transpose(2, 0, 1))


class Predictor:
    """A detector on images as they are, resized as for the test. Detectron2's ``DefaultPredictor``
    does the same for one that it builds itself."""

    def __init__(self, detector: nn.Module, cfg: CfgNode):
        """
        Args:
            detector: in eval mode.
            cfg: has ``INPUT.FORMAT``, ``INPUT.MIN_SIZE_TEST`` and ``INPUT.MAX_SIZE_TEST``.
        """
        self.detector = detector
        self.input_format = cfg.INPUT.FORMAT
        self._size, self._max_size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self._resize = T.ResizeShortestEdge([self._size] * 2, self._max_size)

    def read(self, path: str) -> np.ndarray:
        """An image file, (H, W, C) uint8, its channels as the detector expects them.

        Raises:
            UserError: if the file is no image, or so narrow that resizing leaves nothing of it.
        """
        image = read_image(path, self.input_format)
        height, width = image.shape[:2]
        shape = T.ResizeShortestEdge.get_output_shape(height, width, self._size, self._max_size)
        if self._size and min(shape) < 1:
            raise UserError(f"{path} is {width} x {height}: resizing leaves nothing of it")
        return image

    def network_input(self, image: np.ndarray) -> Dict[str, Any]:
        """
        Args:
            image: see :meth:`read`.

        Returns:
            "image" (C, h, w), float32, resized; "height" and "width" of the original.
        """
        height, width = image.shape[:2]
        resized = self._resize.get_transform(image).apply_image(image)
        return {"image": as_input(resized), "height": height, "width": width}

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """
        Args:
            image: see :meth:`read`.

        Returns:
            detections on the CPU, boxes in pixels of the original.
        """
        return self.detector([self.network_input(image)])[0]["instances"].to("cpu")

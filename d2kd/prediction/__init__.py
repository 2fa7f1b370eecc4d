"""Running a trained detector on image files."""

from .images import SAMPLE_PHOTOGRAPH, image_files, images_at_hand
from .predictor import Predictor, as_input

__all__ = [
    "SAMPLE_PHOTOGRAPH",
    "Predictor",
    "as_input",
    "image_files",
    "images_at_hand",
]

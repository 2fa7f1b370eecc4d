"""Dense detectors that Detectron2 lacks, or offers in Python configs only."""

# Importing registers them in Detectron2's META_ARCH_REGISTRY.
from .config import add_dense_detector_config
from .fcos import FCOS

__all__ = ["FCOS", "add_dense_detector_config"]

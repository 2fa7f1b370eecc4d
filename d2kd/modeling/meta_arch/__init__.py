"""Dense detectors that Detectron2 lacks, or offers in Python configs only."""

# Importing registers them in Detectron2's META_ARCH_REGISTRY.
from .atss import ATSS
from .fcos import FCOS
from .gfl import GFL
from .paper_fcos import PaperFCOS

__all__ = ["ATSS", "FCOS", "GFL", "PaperFCOS"]

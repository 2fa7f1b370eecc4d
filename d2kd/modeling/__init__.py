"""Detectors and backbones that Detectron2 lacks."""

# Importing registers them in Detectron2's registries.
from . import backbone, meta_arch
from .config import add_dense_detector_config

__all__ = ["add_dense_detector_config", "backbone", "meta_arch"]

"""Detectors and backbones that Detectron2 lacks."""

# Importing registers them in Detectron2's registries.
from . import backbone, meta_arch
from .config import add_modeling_config

__all__ = ["add_modeling_config", "backbone", "meta_arch"]

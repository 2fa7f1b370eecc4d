"""d2kd: distillation of object detectors in Detectron2."""

__version__ = "0.3.0"

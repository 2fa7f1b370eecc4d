"""A trained student as a program or file for use without d2kd: ONNX, TorchScript, bare weights."""

from .exporting import FORMATS, Exported, ExportOptions, export_student

__all__ = ["FORMATS", "ExportOptions", "Exported", "export_student"]

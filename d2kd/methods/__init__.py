"""The distillation methods, a file or a package each."""

import importlib
import pkgutil

from .core import DISTILLER_REGISTRY, Distiller

# Everything in this folder is imported, for its registration: a new method is a new file.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["DISTILLER_REGISTRY", "Distiller"]

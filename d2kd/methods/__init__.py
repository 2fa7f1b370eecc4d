"""The distillation methods, one file each."""

import importlib
import pkgutil

from .distiller import DISTILLER_REGISTRY, Distiller, Needs

# Every file of this folder is imported, for its registration: a new method is a new file.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["DISTILLER_REGISTRY", "Distiller", "Needs"]

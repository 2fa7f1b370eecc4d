"""Configs that are Python programs: Detectron2's LazyConfig, as ViTDet and the new baselines have.

Such a config describes calls, which build model, data, optimizer and schedule. What else a run has
to know stands in Detectron2's YAML configs as well; :data:`PLACES` says where in a Python config.
So a run has a ``CfgNode`` in either case, which is what counts; that of a Python config carries the
calls with it, as text under ``LAZY``. No file in YAML can set that key.
"""

from .places import PLACES, errors_in_lazy_words, values_of
from .program import is_python, load_program, python_overrides, refuse_incomplete
from .run import (
    checkpoints_kept,
    config_text,
    errors_in_words_of,
    is_lazy,
    lazy_config,
    set_num_classes,
    target_of,
    test_size,
)
from .text import comparable, to_program, to_text

__all__ = [
    "PLACES",
    "checkpoints_kept",
    "comparable",
    "config_text",
    "errors_in_lazy_words",
    "errors_in_words_of",
    "is_lazy",
    "is_python",
    "lazy_config",
    "load_program",
    "python_overrides",
    "refuse_incomplete",
    "set_num_classes",
    "target_of",
    "test_size",
    "to_program",
    "to_text",
    "values_of",
]

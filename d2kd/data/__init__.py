"""Data: the embedded Shapes sets, checks, and a training loader that resumes exactly."""

from .builtin import datasets_root, register_all

register_all(datasets_root())  # importing this package is what makes the names known

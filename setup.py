"""Package d2kd with its configs and assets, so that an installed d2kd needs no checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).resolve().parent / "d2kd" / "__init__.py"

setup(
    name="d2kd",
    version=re.search(r'__version__ = "(.+)"', INIT.read_text(encoding="utf-8")).group(1),
    description="Distillation of object detectors in Detectron2",
    python_requires=">=3.8",
    # No detectron2: its authors do not publish it on PyPI, and what stands there under that name is
    # not theirs. Install its main branch, or run tools/install_detectron2.py.
    # No pins: tools/constraints.txt has the tested versions.
    install_requires=[
        "fvcore",
        "matplotlib",
        "numpy",
        # Not opencv-python: d2kd opens no window, and that package needs libGL, which servers lack.
        "opencv-python-headless",
        "pycocotools",
        "tensorboard",
        "timm",
        "torch>=2.0",
        "torchvision",
    ],
    extras_require={"dev": ["pytest", "ruff"]},
    packages=[*find_packages(include=["d2kd", "d2kd.*"]), "d2kd.configs"],
    package_dir={"d2kd.configs": "configs"},
    package_data={"d2kd": ["assets/**/*"], "d2kd.configs": ["**/*.yaml"]},
    entry_points={"console_scripts": ["d2kd-train = d2kd.engine.launch:main"]},
)

"""Package d2kd with its configs and assets, so that an installed d2kd needs no checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).resolve().parent / "d2kd" / "__init__.py"

setup(
    name="d2kd",
    version=re.search(r'__version__ = "(.+)"', INIT.read_text(encoding="utf-8")).group(1),
    description="Distillation of object detectors in Detectron2",
    long_description=(INIT.parent.parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    # No detectron2: its authors do not publish it on PyPI, and what stands there under that name is
    # not theirs. Install its main branch, or run python -m d2kd.install_detectron2.
    # No pins: tools/constraints.txt has the tested versions. The lowest ones here are tried, too:
    # docs/robustness.md.
    install_requires=[
        "fvcore",
        "jinja2",
        "matplotlib",
        "numpy>=1.26",
        # Not opencv-python: d2kd opens no window, and that package needs libGL, which servers lack.
        "opencv-python-headless",
        "pycocotools",
        "scipy",
        "tensorboard",
        "timm",
        # Older versions read checkpoints by means that can be made to run what a file holds
        "torch>=2.6",
        "torchvision>=0.21",
    ],
    extras_require={
        "completion": ["shtab"],
        "dev": [
            "faster-coco-eval",
            "globox",
            "hypothesis",
            "onnx",
            "onnxruntime",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shtab",
        ],
        "export": ["onnx", "onnxruntime"],
        "fast-eval": ["faster-coco-eval"],
        "yolo": ["globox"],
    },
    packages=[*find_packages(include=["d2kd", "d2kd.*"]), "d2kd.configs", "d2kd.docs"],
    package_dir={"d2kd.configs": "configs", "d2kd.docs": "docs"},
    package_data={
        "d2kd": ["assets/**/*", "report/*.html"],
        "d2kd.configs": ["**/*.yaml", "**/*.py"],
        "d2kd.docs": ["*.yaml", "costs.json"],
    },
    entry_points={
        "console_scripts": ["d2kd = d2kd.cli.main:main", "d2kd-train = d2kd.cli.main:train"]
    },
)

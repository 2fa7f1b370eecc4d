"""Imports go one way, and every package can be imported first."""

import ast
import graphlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import d2kd

ROOT = Path(d2kd.__file__).parent
# From the bottom up; a package imports those below it, and those beside it in a row.
LAYERS = [
    {"command", "errors", "install_detectron2", "labels", "lazy", "one_line", "schema"}
    | {"writing", "yacs_errors"},
    {"layers"},
    {"modeling", "data", "model_zoo", "safe_yaml"},
    {"views"},
    {"methods"},
    {"config"},
    {"checkpoint"},
    {"distillation"},
    {"engine"},
    {"analysis", "benchmark", "catalogue", "check", "comparison", "export", "pairing", "prediction"}
    | {"report", "visualization"},
    {"cli"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(ROOT.rglob("*.py"))


def package_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports_of(path):
    """(line, module, whether at the top of the file) of every import of d2kd in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    here = ["d2kd", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if node.module else [f"{module}.{a.name}" for a in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "d2kd":
                yield node.lineno, name, id(node) in top


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_or_sideways(path):
    if path == ROOT / "__init__.py" or path == ROOT / "__main__.py":
        return
    height = HEIGHT[package_of(path)]
    for line, name, at_top in imports_of(path):
        parts = name.split(".")
        assert at_top, f"{path}:{line} imports {name} inside a function"
        if len(parts) > 1 and parts[1] != "__version__":
            assert HEIGHT[parts[1]] <= height, f"{path}:{line} imports {name}, which is above it"


def test_packages_of_a_row_do_not_import_each_other_in_a_circle():
    rows = {}  # package -> those beside it that it imports
    for path in FILES:
        name = package_of(path)
        imported = {module.split(".")[1] for _, module, _ in imports_of(path) if "." in module}
        beside = {x for x in imported if HEIGHT.get(x) == HEIGHT.get(name, -1)} - {name}
        rows.setdefault(name, set()).update(beside)
    try:
        tuple(graphlib.TopologicalSorter(rows).static_order())
    except graphlib.CycleError as circle:
        pytest.fail(f"these import each other: {' <- '.join(circle.args[1])}")


def test_every_package_has_a_layer():
    names = {m.name for m in pkgutil.iter_modules([str(ROOT)])} - {"__main__"}
    assert names <= set(HEIGHT)


# One process imports what others bring, and forks one for each package of ours.
FORKS = """
import importlib, os, sys
import cv2, detectron2.data, detectron2.engine, detectron2.evaluation, detectron2.modeling, timm
for name in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(f"d2kd.{name}")
        os._exit(0)
    assert os.wait()[1] == 0, f"d2kd.{name} cannot be imported first"
"""


def test_every_package_can_be_imported_first():
    names = sorted({m.name for m in pkgutil.iter_modules([str(ROOT)])} - {"__main__"})
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    command = [sys.executable, "-W", "ignore", "-c", FORKS, *names]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_the_backend_of_matplotlib_is_the_users():
    # pyplot draws with one for the whole process; figures of ours need none.
    users = [path for path in FILES if "pyplot" in path.read_text()]
    assert not users


def test_files_are_short():
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES)
    assert lengths[len(lengths) // 2] <= 150
    assert lengths[-1] <= 400

#!/usr/bin/env python3
"""Install Detectron2 0.6 (Python parts) into this Python, unless a Detectron2 works here already.

Detectron2's authors do not publish it on PyPI. Who can reach GitHub installs the main branch
(``pip install 'git+https://github.com/facebookresearch/detectron2.git'``) and does not need this
script. PyPI carries the Python sources of release 0.6 as ``pb1-detectron2``; they lack the C++/CUDA
ops and do not run with today's libraries. This script downloads them with pip, which checks their
hash before it runs anything in them, applies ``FIXES``, tries the result in a process of its own,
and installs it as the distribution ``detectron2`` 0.6 (``pip uninstall detectron2`` removes it).
When a step fails, nothing of Detectron2 is installed.

    python -m d2kd.install_detectron2           # needs torch, torchvision, setuptools and wheel
    python -m d2kd.install_detectron2 --check   # only say what is installed; exit 1 if nothing is
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterable, List, Optional, Tuple

SOURCE = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# What Detectron2 0.6 itself declares, without the upper bounds and what only caffe2 export needs.
REQUIREMENTS = [
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "omegaconf>=2.1",
    "Pillow>=9.4",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
]

Fix = Tuple[str, str, str, int]

# (file in detectron2/, old text, new text, how often the old text must be there)
FIXES: List[Fix] = [
    # Names that Pillow 10 removed.
    ("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR", 1),
    # Names that numpy 1.24 removed.
    ("data/build.py", "dtype=np.int\n", "dtype=int\n", 1),
    ("data/build.py", "dtype=np.int)", "dtype=int)", 1),
    ("data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)", 1),
    ("evaluation/pascal_voc_evaluation.py", ".astype(np.bool)", ".astype(bool)", 2),
    ("evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    ("evaluation/sem_seg_evaluation.py", "dtype=np.float)", "dtype=float)", 2),
    ("evaluation/sem_seg_evaluation.py", ".astype(np.float)", ".astype(float)", 3),
    ("structures/masks.py", ".astype(np.bool)", ".astype(bool)", 2),
    ("structures/masks.py", "dtype=np.bool)", "dtype=bool)", 1),
    ("utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)", 1),
    ("utils/visualizer.py", ".astype(np.bool)", ".astype(bool)", 3),
    # setuptools 82 has no pkg_resources.
    ("model_zoo/model_zoo.py", "import pkg_resources\n", "", 1),
    (
        "model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )",
        'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)',
        1,
    ),
    # caffe2 left PyTorch: its half of the export is optional.
    (
        "export/__init__.py",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ImportError:  # no caffe2\n    pass\n",
        1,
    ),
    # Python 3.11 does not sample from sets.
    (
        "data/common.py",
        "sample(self._fallback_candidates, k=1)",
        "sample(sorted(self._fallback_candidates), k=1)",
        1,
    ),
    # Stock schedulers are no _LRScheduler since torch 2.0: their state was lost on resume.
    ("engine/hooks.py", "lr_scheduler._LRScheduler)", "lr_scheduler.LRScheduler)", 2),
    # The norm is built only for its name, and GroupNorm has 32 groups.
    ("modeling/meta_arch/retinanet.py", "get_norm(norm, 1)", "get_norm(norm, 32)", 1),
    # Without the compiled ops COCO evaluation uses pycocotools.
    (
        "evaluation/fast_eval_api.py",
        "from detectron2 import _C\n",
        'raise ImportError("Detectron2 was installed without its compiled ops")\n',
        1,
    ),
    (
        "evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "try:\n"
        "    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n"
        "    COCOeval_opt = COCOeval\n",
        1,
    ),
    # The only op that is not reached through _C.
    (
        "layers/nms.py",
        "    return torch.ops.detectron2.nms_rotated(",
        "    from detectron2 import _C\n\n    return _C.nms_rotated(",
        1,
    ),
]

# Stands in for the extension module, which 0.6 imports even where no op of it is used.
NO_COMPILED_OPS = '''\
"""Stand-in for the C++/CUDA ops: this Detectron2 was installed without them."""


def _missing(op):
    def raise_error(*args, **kwargs):
        raise RuntimeError(
            f"compiled op detectron2._C.{op} is not available: this Detectron2 was installed "
            "without its C++/CUDA ops; install Detectron2 from its repository to get them"
        )

    return raise_error


for _op in (
    "box_iou_rotated",
    "deform_conv_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_filter",
    "modulated_deform_conv_forward",
    "modulated_deform_conv_backward",
    "nms_rotated",
    "roi_align_rotated_forward",
    "roi_align_rotated_backward",
):
    globals()[_op] = _missing(_op)


def get_compiler_version():
    return "not compiled"


def get_cuda_version():
    return "not compiled"


def has_cuda():
    return False
'''

PROJECTS = ["PointRend/point_rend", "DeepLab/deeplab", "Panoptic-DeepLab/panoptic_deeplab"]

SETUP = f"""\
from pathlib import Path

from setuptools import find_packages, setup

zoo = Path("detectron2/model_zoo")
configs = [p.relative_to(zoo) for p in zoo.glob("configs/**/*") if p.suffix in (".py", ".yaml")]
setup(
    name="detectron2",
    version="0.6",
    description="Detectron2 0.6 without compiled ops, fixed for today's libraries",
    url="https://github.com/facebookresearch/detectron2",
    license="Apache-2.0",
    packages=find_packages(),
    package_data={{"detectron2.model_zoo": [str(p) for p in configs]}},
    install_requires={REQUIREMENTS!r},
)
"""

PROBE = """
import importlib.util, json
if importlib.util.find_spec("detectron2") is None:
    raise SystemExit("absent")
import detectron2, detectron2.engine, detectron2.evaluation, detectron2.export, torch, torchvision
from detectron2 import model_zoo
model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
try:
    from detectron2 import _C
    compiled = not _C.__file__.endswith(".py")
except ImportError:
    compiled = False
print(json.dumps({
    "version": detectron2.__version__,
    "path": list(detectron2.__path__)[0],
    "compiled": compiled,
    "torch": torch.__version__,
    "torchvision": torchvision.__version__,
}))
"""


class InstallError(Exception):
    """A step failed; the message is one line that says which and what to do."""


def run_python(*args: str, **options) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **options)


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no message"


def pip(*args: str) -> None:
    """Run pip; its first error line (the rest only explains it) becomes an ``InstallError``."""
    result = run_python("-m", "pip", "--quiet", "--disable-pip-version-check", *args)
    if result.returncode != 0:
        errors = [x for x in result.stderr.splitlines() if x.startswith("ERROR: ")]
        reason = errors[0][len("ERROR: ") :] if errors else last_line(result.stderr)
        raise InstallError(f"pip {args[0]} failed: {reason}")


def probe(
    path: Optional[Path] = None,
    remedy: str = "repair it, or run `pip uninstall detectron2` and then this script again",
) -> Optional[dict]:
    """What Detectron2 this Python imports, tried in a process of its own.

    Args:
        path: a folder to look in first.
        remedy: what to do about a Detectron2 that cannot be imported.

    Returns:
        version, path, compiled (has the C++/CUDA ops), torch, torchvision; None without Detectron2.

    Raises:
        InstallError: there is a Detectron2, but it cannot be imported.
    """
    env = dict(os.environ, PYTHONPATH=str(path)) if path else None
    # Not in the current folder, which may hold a folder named detectron2.
    result = run_python("-c", PROBE, cwd=sys.prefix, env=env)
    if result.returncode == 0:
        return json.loads(last_line(result.stdout))
    if last_line(result.stderr) == "absent":
        return None
    raise InstallError(f"Detectron2 does not import ({last_line(result.stderr)}): {remedy}")


def check_prerequisites() -> None:
    """Raise an ``InstallError`` unless torch 2.6, torchvision, setuptools and wheel are there."""
    for module, remedy in (
        ("pip", "python -m ensurepip"),
        ("setuptools", "pip install setuptools"),
        ("wheel", "pip install wheel"),
        ("torch", "pip install torch torchvision"),
        ("torchvision", "pip install torch torchvision"),
    ):
        result = run_python("-c", f"import {module}; print({module}.__version__)")
        if result.returncode != 0:
            raise InstallError(
                f"{module} does not import ({last_line(result.stderr)}): first run `{remedy}`"
            )
        version = result.stdout.strip()
        if module == "torch" and tuple(map(int, version.split(".")[:2])) < (2, 6):
            raise InstallError(f"torch {version} is too old: d2kd needs torch 2.6")


def download(folder: Path) -> Path:
    """Download the source package into ``folder`` and unpack it.

    Returns:
        the root of the unpacked sources.

    Raises:
        InstallError: no network, no such package, another hash than ``SHA256``, or too new a pip.
    """
    # With the hash in the requirement pip checks it before it runs the package's setup.py.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{SOURCE} --hash=sha256:{SHA256}\n")
    try:
        pip(
            *("download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"),
            *("--dest", str(folder), "--requirement", str(requirement)),
        )
    except InstallError as e:
        hint = f"is the package index reachable, {SOURCE} unchanged?"
        if "direct URL" in str(e):  # an extra of it, which nothing here installs, names one
            hint = "pip 26.3 and newer do not take this package; run `pip install 'pip<26.3'` first"
        raise InstallError(f"{e} ({hint})") from e
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(str(archive), folder)
    return folder / archive.name[: -len(".tar.gz")]


def apply_fixes(package: Path, fixes: Iterable[Fix] = FIXES) -> None:
    """Apply text substitutions to the files of a package, in place.

    Raises:
        InstallError: an old text is not there as often as its fix says.
    """
    for name, old, new, count in fixes:
        file = package / name
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        found = text.count(old)
        if found != count:
            raise InstallError(
                f"fix no longer matches {name}: expected {count} x {old!r}, found {found}"
            )
        file.write_text(text.replace(old, new), encoding="utf-8")


def assemble(source: Path, tree: Path) -> None:
    """Make an installable tree of the fixed package from the unpacked sources."""
    package = tree / "detectron2"
    shutil.copytree(source / "detectron2", package)
    for project in PROJECTS:
        shutil.copytree(source / "projects" / project, package / "projects" / Path(project).name)
    shutil.copy(source / "LICENSE", tree)
    apply_fixes(package)
    (package / "_C.py").write_text(NO_COMPILED_OPS)
    (tree / "setup.py").write_text(SETUP)


def install() -> None:
    """Download, fix, try and install; each step raises an ``InstallError`` when it fails."""
    check_prerequisites()
    with tempfile.TemporaryDirectory(prefix="detectron2-") as folder:
        tree = Path(folder, "tree")
        assemble(download(Path(folder)), tree)
        pip("install", *REQUIREMENTS)
        probe(tree, "use the versions of torch and the libraries in tools/constraints.txt")
        pip("install", "--no-deps", "--no-build-isolation", str(tree))


def describe(found: dict) -> str:
    ops = "with compiled ops" if found["compiled"] else "without compiled ops"
    return "detectron2 {version} at {path}, {ops}; torch {torch}, torchvision {torchvision}".format(
        ops=ops, **found
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say what is installed")
    check_only = parser.parse_args().check
    try:
        found = probe()
        if found is None and not check_only:
            print(f"Installing Detectron2 0.6 from {SOURCE} ...", flush=True)
            install()
            found = probe()
    except InstallError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(describe(found) if found else "detectron2 is not installed")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())

"""d2kd/install_detectron2.py: everything but the download, and what it leaves behind."""

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "d2kd" / "install_detectron2.py"
spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
installer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(installer)


def run_script(*args, **env):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *args],
        env=dict(os.environ, **env),
        capture_output=True,
        text=True,
    )


@pytest.fixture
def package(tmp_path):
    (tmp_path / "a.py").write_text("x = np.bool\ny = np.bool\n")
    (tmp_path / "b.py").write_text("z = Image.LINEAR\n")
    return tmp_path


def test_fixes_replace_every_occurrence_and_nothing_else(package):
    installer.apply_fixes(package, [("a.py", "np.bool", "bool", 2)])
    assert (package / "a.py").read_text() == "x = bool\ny = bool\n"
    assert (package / "b.py").read_text() == "z = Image.LINEAR\n"


@pytest.mark.parametrize(
    "fix, found",
    [
        (("b.py", "Image.CUBIC", "Image.BICUBIC", 1), 0),
        (("a.py", "np.bool", "bool", 1), 2),
        (("missing.py", "x", "y", 1), 0),
    ],
)
def test_a_fix_that_no_longer_matches_is_an_error(package, fix, found):
    with pytest.raises(installer.InstallError, match=f"{fix[0]}: expected 1 x .*found {found}"):
        installer.apply_fixes(package, [fix])


def source_package(folder, setup):
    """Something that pip takes for the source package."""
    with tarfile.open(folder / "pb1-detectron2-0.6.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("pb1-detectron2-0.6/setup.py")
        info.size = len(setup)
        tar.addfile(info, io.BytesIO(setup.encode()))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder where pip looks for packages, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_another_hash_is_an_error_before_anything_of_it_runs(index, tmp_path):
    source_package(index, f"open({str(tmp_path / 'has_run')!r}, 'w')")
    with pytest.raises(installer.InstallError, match="HASH") as error:
        installer.download(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "has_run").exists()


def test_no_network_is_an_error_of_one_line(index, tmp_path):
    with pytest.raises(installer.InstallError, match="is the package index reachable") as error:
        installer.download(tmp_path)
    assert "\n" not in str(error.value)


def test_too_new_a_pip_is_an_error_that_names_the_remedy(tmp_path, monkeypatch):
    def refuse(*args):
        raise installer.InstallError("Distributions from PyPI cannot declare direct URL ...")

    monkeypatch.setattr(installer, "pip", refuse)
    with pytest.raises(installer.InstallError, match="pip install 'pip<26.3'"):
        installer.download(tmp_path)


def test_nothing_is_installed_when_a_step_fails(monkeypatch):
    def fail(source, tree):
        raise installer.InstallError("fix no longer matches")

    installs = []
    monkeypatch.setattr(installer, "check_prerequisites", lambda: None)
    monkeypatch.setattr(installer, "download", lambda folder: folder)
    monkeypatch.setattr(installer, "assemble", fail)
    monkeypatch.setattr(installer, "pip", lambda *args: installs.append(args))
    with pytest.raises(installer.InstallError, match="no longer matches"):
        installer.install()
    assert not installs


def test_check_says_what_is_installed():
    result = run_script("--check")
    assert result.returncode == 0
    assert result.stdout.startswith("detectron2 ")
    assert "compiled ops" in result.stdout
    assert f"torch {torch.__version__}" in result.stdout


def test_check_says_that_nothing_is_installed(monkeypatch, capsys):
    monkeypatch.setattr(installer, "probe", lambda: None)
    monkeypatch.setattr(sys, "argv", ["install_detectron2.py", "--check"])
    assert installer.main() == 1
    assert capsys.readouterr().out == "detectron2 is not installed\n"


def test_a_broken_detectron2_is_reported_and_left_alone(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    result = run_script(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "undefined symbol" in result.stderr and "pip uninstall detectron2" in result.stderr


def installed_by_script():
    """Whether the compiled ops have the script's stand-in (the main branch is 0.6, too)."""
    ops = importlib.util.find_spec("detectron2._C")
    return ops is not None and ops.origin.endswith(".py")


@pytest.fixture(scope="module")
def release_0_6():
    if not installed_by_script():
        pytest.skip("this Detectron2 is not the one that d2kd/install_detectron2.py installs")


@pytest.mark.usefixtures("release_0_6")
class TestInstalled:
    """What the fixes are for."""

    def test_compiled_ops_raise_a_clear_error(self):
        from detectron2.layers import nms_rotated
        from detectron2.layers.rotated_boxes import pairwise_iou_rotated

        with pytest.raises(RuntimeError, match="compiled op .*box_iou_rotated is not available"):
            pairwise_iou_rotated(torch.rand(1, 5), torch.rand(1, 5))
        with pytest.raises(RuntimeError, match="compiled op .*nms_rotated is not available"):
            nms_rotated(torch.rand(1, 5), torch.rand(1), 0.5)

    def test_coco_evaluation_uses_pycocotools(self):
        from detectron2.evaluation import coco_evaluation
        from pycocotools.cocoeval import COCOeval

        with pytest.raises(ImportError, match="compiled ops"):
            import detectron2.evaluation.fast_eval_api  # noqa: F401
        assert coco_evaluation.COCOeval_opt is COCOeval

    def test_collect_env_works(self):
        from detectron2.utils.collect_env import collect_env_info

        assert "not compiled" in collect_env_info()

    def test_state_of_a_stock_scheduler_is_saved_and_loaded(self):
        from detectron2.engine.hooks import LRScheduler

        def make():
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
            optimizer.step()
            scheduler.step()
            return LRScheduler(optimizer, scheduler)

        hook = make()
        hook.scheduler.step()
        resumed = make()
        resumed.load_state_dict(hook.state_dict())
        assert resumed.scheduler.last_epoch == hook.scheduler.last_epoch == 2

    def test_retinanet_head_takes_group_norm(self):
        from detectron2 import model_zoo
        from detectron2.modeling import build_model

        cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
        cfg.MODEL.DEVICE, cfg.MODEL.RETINANET.NORM = "cpu", "GN"
        norms = [m for m in build_model(cfg).head.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert len(norms) == 8

    def test_a_mapper_that_drops_an_image_gets_another_one(self):
        from detectron2.data import MapDataset

        dataset = MapDataset(list(range(4)), lambda i: i if i != 2 else None)
        assert dataset[2] in (0, 1, 3)

    def test_projects_are_there(self):
        from detectron2.projects import deeplab, point_rend  # noqa: F401

        # This one imports only where panopticapi is installed, as in every Detectron2.
        assert importlib.util.find_spec("detectron2.projects.panoptic_deeplab")

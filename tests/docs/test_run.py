"""The commands that a reader types first are run, one after the other, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import SHELL, blocks, commands
from PIL import Image
from small import SHORT
from small_run import TOY

from d2kd.data.shapes_files import prepare_shapes

pytestmark = pytest.mark.docs

SMALL = Path(__file__).with_name("small.py")
PAGES = ["README.md", "docs/training.md", "docs/quick-start.md", "docs/export.md", "docs/report.md"]
# What is trained before, where a page starts from runs
TRAINED = {
    "docs/export.md": ["shapes/baselines/fcos_tiny", "shapes/frs/fcos_tiny"],
    "docs/report.md": ["shapes/baselines/fcos_tiny", "shapes/frs/fcos_tiny"],
}
# They train for minutes or time something; tests/cli tries them
LONG = ("compare", "benchmark")


def run(folder, *words):
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(folder / "datasets"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def add_images(folder):
    """Images of a reader's own, in the folders that the pages name."""
    for name in ("images/one.jpg", "more/two.png"):
        (folder / name).parent.mkdir()
        Image.new("RGB", (96, 64), "white").save(folder / name)


@pytest.mark.parametrize("page", PAGES)
def test_commands_work_in_order(page, tmp_path):
    for recipe in TRAINED.get(page, ()):
        run(tmp_path, str(SMALL), "train", "--config-file", recipe)
    add_images(tmp_path)
    shell = [block for block in blocks(page) if block.language in SHELL and not block.needs]
    for words in (words for block in shell for words in commands(block)):
        if words[0] == "d2kd" and words[1] not in LONG:
            run(tmp_path, str(SMALL), *words[1:])


def test_a_method_from_elsewhere_is_trained_with(tmp_path):
    code = [b.text for b in blocks("docs/adding-a-method.md") if b.language == "python"]
    for name, content in zip(("my_method.py", "my_d2kd.py"), (code[0], code[-1])):
        (tmp_path / name).write_text(content)
    prepare_shapes(TOY, str(tmp_path / "toy"))
    data = ["--train-json", "toy/annotations/instances_train.json", "--train-images", "toy/train"]
    config = ["--config-file", "shapes/frs/fcos_tiny.yaml", "DISTILL.METHODS", "['MyMethod']"]
    words = [*config, *data, "DATASETS.TEST", "()", *SHORT]
    run(tmp_path, "my_d2kd.py", "train", *words)
    run(tmp_path, "my_d2kd.py", "check", "--config-only", *words)
    assert "loss_mymethod_feature" in (tmp_path / "output/shapes/frs/fcos_tiny/log.txt").read_text()
    sets = [
        f"[{{json: toy/annotations/instances_{split}.json, images: toy/{split}}}]"
        for split in ("train", "val")
    ]
    opts = ["DISTILL.METHODS", "['MyMethod']", "DATASETS.TRAIN", sets[0], "DATASETS.TEST", sets[1]]
    run(tmp_path, "my_d2kd.py", "compare", config[1], "--output", "compared", *opts, *SHORT)
    log = tmp_path / "compared" / "shapes/frs/fcos_tiny_seed1" / "log.txt"
    assert "loss_mymethod_feature" in log.read_text()


def test_a_script_of_ones_own_trains(tmp_path):
    python = [b.text for b in blocks("docs/own-script.md") if b.language == "python"]
    for name, content in zip(("my_data.py", "my_d2kd.py", "my_train.py", "my_loop.py"), python):
        (tmp_path / name).write_text(content)
    run(tmp_path, str(SMALL), "my_train.py", "MODEL.DEVICE", "cpu", *SHORT)
    run(tmp_path, str(SMALL), "my_d2kd.py", "eval", "output/mine")
    two = ("-m", "torch.distributed.run", "--nproc_per_node", "2", str(SMALL), "my_train.py")
    run(tmp_path, *two, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", "output/two", *SHORT)
    assert (tmp_path / "output/two/log.txt.rank1").is_file()
    run(tmp_path, str(SMALL), "my_loop.py")
    assert (tmp_path / "student.pth").is_file()
    assert "loss_frs_feature" in (tmp_path / "output/mine/log.txt").read_text()

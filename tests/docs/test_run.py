"""The commands that a reader types first are run, one after the other, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import SHELL, blocks, commands
from small import SHORT
from small_run import TOY

from d2kd.data.shapes_files import prepare_shapes

pytestmark = pytest.mark.docs

SMALL = Path(__file__).with_name("small.py")
PAGES = ["README.md", "docs/training.md", "docs/quick-start.md"]
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


@pytest.mark.parametrize("page", PAGES)
def test_commands_work_in_order(page, tmp_path):
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

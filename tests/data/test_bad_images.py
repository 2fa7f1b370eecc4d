"""A file that is no image: one line with its name, or, by choice, skipped and counted."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from PIL import Image
from small_shapes import SMALL

from d2kd.config import default_config
from d2kd.data import bad_images
from d2kd.data.builtin import register_shapes
from d2kd.data.loader import BAD_IMAGES, ResumableLoader
from d2kd.engine import DistillTrainer
from d2kd.errors import UserError


@pytest.fixture
def files(tmp_path):
    """Registers a set of its own; the paths of its images."""
    register_shapes(SMALL, str(tmp_path))
    yield [d["file_name"] for d in DatasetCatalog.get("small_train")]
    for split in ("train", "val"):
        DatasetCatalog.remove(f"small_{split}")
        MetadataCatalog.remove(f"small_{split}")


def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


def loader(skip, workers=0, grouping=True, mapper=None, **options):
    cfg = default_config()
    cfg.DATASETS.TRAIN = ("small_train",)
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.INPUT.MIN_SIZE_TRAIN = (40, 48)
    cfg.RUN.SKIP_BAD_IMAGES = skip
    cfg.SEED = 7
    seed_all_rng(cfg.SEED)
    return ResumableLoader(cfg, mapper, **options)


def first_epoch(batches, files):
    return list(itertools.islice(batches, len(files) // 4 + 1))


def resize(path):
    Image.new("RGB", (7, 7)).save(path)


def empty(path):
    os.truncate(path, 0)


def deepen(path):
    """As many pixels, of 16 bits."""
    size = Image.open(path).size
    Image.fromarray(np.full(size[::-1], 4000, np.uint16)).save(path, "PNG")


@pytest.mark.parametrize(
    "damage, workers",
    [(truncate, 0), (empty, 0), (os.remove, 0), (resize, 0), (deepen, 0), (truncate, 2)],
)
def test_the_file_is_named(files, damage, workers):
    batches = loader(0, workers)
    for path in files[3:]:
        damage(path)
    with pytest.raises(UserError) as error:
        first_epoch(batches, files)
    message = str(error.value)
    assert "\n" not in message and "RUN.SKIP_BAD_IMAGES" in message
    assert any(f"image {path} cannot be read (" in message for path in files[3:])


def test_an_image_of_which_resizing_leaves_nothing_is_named(files):
    dicts = DatasetCatalog.get("small_train")
    wide = next(d for d in dicts if d["width"] > d["height"])
    Image.new("RGB", (4000, 1)).save(wide["file_name"])
    wide.update(width=4000, height=1)
    with pytest.raises(UserError, match=f"image {wide['file_name']} .*is 4000 x 1: .*nothing"):
        first_epoch(loader(0, dataset=dicts), files)
    batches = first_epoch(loader(1, dataset=dicts), files)
    assert all(d["file_name"] != wide["file_name"] for batch in batches for d in batch)


@pytest.mark.parametrize("grouping", [True, False])
def test_skipped_up_to_a_limit_and_counted(files, grouping, caplog):
    bad = {files[3], files[8]}
    for path in bad:
        truncate(path)
    batches = first_epoch(loader(2, 0, grouping), files)
    assert {d["file_name"] for b in batches for d in b}.isdisjoint(bad)
    assert all(len(b) == 4 and not any(BAD_IMAGES in d for d in b) for b in batches)
    skipped = [r.message for r in caplog.records if "Skipped image" in r.message]
    assert len(skipped) == 2 and skipped[-1].endswith("2 of at most 2")
    wide = [{d["width"] > d["height"] for d in b} for b in batches]
    assert not grouping or all(len(kinds) == 1 for kinds in wide)
    truncate(files[5])
    with pytest.raises(UserError, match="after 2 others: repair it"):
        list(itertools.islice(loader(2, 0, grouping), 3 * len(files)))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_names_the_file(files, workers):
    cfg = get_cfg()
    cfg.DATALOADER.NUM_WORKERS = workers
    deepen(files[2])
    with pytest.raises(UserError, match=f"^image {files[2]} cannot be read .*8 bits") as error:
        list(DistillTrainer.build_test_loader(cfg, "small_train"))
    assert "\n" not in str(error.value)
    Image.new("RGB", Image.open(files[2]).size).save(files[2])
    assert len(list(DistillTrainer.build_test_loader(cfg, "small_train"))) == len(files)


class Scaling:
    """A mapper that knows what to do with 16 bits."""

    def __call__(self, entry):
        return {"image": np.asarray(Image.open(entry["file_name"])), "width": 1, "height": 2}


def test_a_mapper_of_ones_own_may_read_16_bits(files):
    for path in files:
        deepen(path)
    batch = next(iter(loader(0, 0, False, Scaling(), dataset=DatasetCatalog.get("small_train"))))
    assert all((d["image"] == 4000).all() for d in batch)


class Broken:
    """A mapper with a fault of its own."""

    def __call__(self, entry):
        raise KeyError("its fault")


def test_a_fault_of_the_mapper_is_not_blamed_on_the_image(files):
    with pytest.raises(KeyError, match="its fault"):
        first_epoch(loader(9, mapper=Broken()), files)


def test_the_depth_of_an_image_is_looked_at_once(files, monkeypatch):
    asked = []
    monkeypatch.setattr(bad_images, "too_deep", asked.append)
    list(itertools.islice(loader(0), 2 * len(files) // 4))  # each of them twice
    assert sorted(asked) == sorted(set(asked))


# Evaluates while somebody else sends SIGTERM to all of its processes
EVALUATION = """
import os, signal, subprocess, sys, time
from detectron2.data import build_detection_test_loader
from d2kd.data.bad_images import NamingLoader, NamingMapper

def mapper(entry):
    time.sleep(0.01)
    return entry

signal.signal(signal.SIGTERM, lambda *_: print("asked to stop"))
entries = [{"file_name": str(i), "width": 4, "height": 4} for i in range(60)]
loader = build_detection_test_loader(entries, mapper=NamingMapper(mapper), num_workers=2)
for i, batch in enumerate(NamingLoader(loader)):
    if i == 20:
        kill = f"import os; os.killpg({os.getpgrp()}, {int(signal.SIGTERM)})"
        subprocess.run([sys.executable, "-c", kill], start_new_session=True)
print("evaluated", i + 1)
"""


def test_a_signal_to_all_processes_leaves_loading_for_an_evaluation_to_its_parent():
    words = [sys.executable, "-W", "ignore", "-c", EVALUATION]
    done = subprocess.run(words, capture_output=True, text=True, start_new_session=True)
    assert done.stdout.splitlines() == ["asked to stop", "evaluated 60"], done.stderr

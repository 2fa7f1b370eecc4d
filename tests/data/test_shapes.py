import filecmp
import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
from small_shapes import SMALL

from d2kd.data import shapes, shapes_files
from d2kd.data.outlines import OUTLINES
from d2kd.data.shapes import SHAPES, SHAPES_TINY, draw_image
from d2kd.data.shapes_files import annotation_file, prepare_shapes
from d2kd.errors import UserError


def files_of(folder):
    return sorted(
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder)
        for name in names
    )


def test_an_image_depends_only_on_seed_split_and_index():
    image, objects = draw_image(SHAPES, 3, "val", 7)
    draw_image(SHAPES, 3, "val", 8)
    again, objects_again = draw_image(SHAPES, 3, "val", 7)
    assert np.array_equal(image, again)
    assert [o.label for o in objects] == [o.label for o in objects_again]
    for other in ((4, "val", 7), (3, "train", 7), (3, "val", 8)):
        different, _ = draw_image(SHAPES, *other)
        assert image.shape != different.shape or not np.array_equal(image, different)


def test_two_sets_of_the_same_seed_are_equal_file_by_file(tmp_path):
    for name in ("a", "b"):
        prepare_shapes(SMALL, str(tmp_path / name), seed=5)
    names = files_of(tmp_path / "a")
    assert len(names) == 24 + 6 + 2 + 1
    assert names == files_of(tmp_path / "b")
    _, different, errors = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)
    assert not different and not errors


@pytest.mark.parametrize("spec", [SHAPES_TINY, SHAPES], ids=lambda spec: spec.name)
def test_boxes_lie_inside_and_overlap_little(spec):
    for index in range(40):
        image, objects = draw_image(spec, 0, "train", index)
        height, width = image.shape[:2]
        boxes = np.stack([o.box for o in objects])
        assert (width, height) in spec.sizes
        assert 0 < len(objects) <= spec.objects[1]
        assert (boxes >= 0).all() and (boxes <= (width, height, width, height)).all()
        for i, box in enumerate(boxes[1:], 1):
            assert shapes._overlap(box, boxes[:i]).max() <= shapes.MAX_OVERLAP


@pytest.mark.parametrize("name", sorted(OUTLINES))
def test_boxes_are_tight_around_the_drawn_pixels(name, monkeypatch):
    """On a flat background without noise, the changed pixels reach each side of the box."""
    spec = replace(SHAPES_TINY, classes=(name,), objects=(1, 1))
    monkeypatch.setattr(shapes, "NOISE", 0.0)
    monkeypatch.setattr(
        shapes, "_background", lambda rng, w, h: np.full((h, w, 3), 128, np.float32)
    )
    for index in range(5):
        image, [(_, box, _)] = draw_image(spec, 1, "train", index)
        rows, columns = np.nonzero((image != 128).any(-1))
        drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        # Corners cover a small part of their pixel, so that a side may seem up to 2 pixels short.
        assert np.abs(box - drawn).max() < 2
        assert (box[:2] > np.array(drawn[:2]) - 0.5).all()
        assert (box[2:] < np.array(drawn[2:]) + 2).all()


def test_outlines_fill_the_unit_circle():
    for name, contours in OUTLINES.items():
        radius = np.linalg.norm(contours[0], axis=1).max()
        assert radius == pytest.approx(1), name


def test_classes_and_sizes_are_balanced():
    drawn = [o for i in range(600) for o in draw_image(SHAPES_TINY, 0, "train", i)[1]]
    share = np.array(list(Counter(o.label for o in drawn).values())) / len(drawn)
    assert len(share) == 6 and share.min() > 0.12 and share.max() < 0.22
    assert 1.7 < len(drawn) / 600 <= 2
    sides = np.array([(o.box[2:] - o.box[:2]).max() for o in drawn])
    assert sides.min() > 12 and sides.max() <= 90.5
    assert 0.25 < (sides < 32).mean() < 0.6  # COCO's small and medium are both there


def test_colour_does_not_tell_the_class():
    """The mean colour within the box is the same for all classes, up to chance."""
    colours = [[] for _ in SHAPES_TINY.classes]
    for index in range(400):
        image, objects = draw_image(SHAPES_TINY, 0, "train", index)
        for label, box, _ in objects:
            x, y = ((box[:2] + box[2:]) / 2).astype(int)
            colours[label].append(image[y - 4 : y + 4, x - 4 : x + 4].mean((0, 1)))
    means = np.stack([np.mean(c, 0) for c in colours])
    assert np.abs(means - means.mean(0)).max() < 30


def test_a_complete_set_is_used_again(tmp_path):
    folder = str(tmp_path / "small")
    prepare_shapes(SMALL, folder, seed=2)
    before = os.stat(annotation_file(folder, "train")).st_mtime_ns
    prepare_shapes(SMALL, folder)
    prepare_shapes(SMALL, folder, seed=2)
    assert os.stat(annotation_file(folder, "train")).st_mtime_ns == before


def test_the_json_describes_the_files(tmp_path):
    prepare_shapes(SMALL, str(tmp_path / "small"))
    with open(annotation_file(str(tmp_path / "small"), "train")) as file:
        content = json.load(file)
    assert [c["name"] for c in content["categories"]] == list(SMALL.classes)
    assert [a["id"] for a in content["annotations"]] == list(
        range(1, len(content["annotations"]) + 1)
    )
    sizes = {r["id"]: (r["width"], r["height"]) for r in content["images"]}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        width, height = sizes[annotation["image_id"]]
        assert 0 <= x < x + w <= width + 1e-9 and 0 <= y < y + h <= height + 1e-9
        assert annotation["area"] == pytest.approx(w * h, abs=0.01)
    for record in content["images"]:
        image = cv2.imread(str(tmp_path / "small" / "train" / record["file_name"]))
        assert image.shape == (record["height"], record["width"], 3)


def test_something_else_is_never_overwritten(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{other} exists but holds no complete small"):
        prepare_shapes(SMALL, str(other))
    assert files_of(other) == ["precious.txt"]

    prepare_shapes(SMALL, str(tmp_path / "small"), seed=0)
    with pytest.raises(UserError, match="'seed': 0.*expected.*'seed': 1.*move or delete"):
        prepare_shapes(SMALL, str(tmp_path / "small"), seed=1)
    manifest = tmp_path / "small" / shapes_files.MANIFEST
    manifest.write_text("[1]")
    with pytest.raises(UserError, match="no readable manifest.json"):
        prepare_shapes(SMALL, str(tmp_path / "small"))


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write.*DETECTRON2_DATASETS"):
        prepare_shapes(SMALL, str(tmp_path / "file" / "small"))


def test_a_killed_run_leaves_nothing_that_is_taken_for_the_set(tmp_path, monkeypatch):
    folder = str(tmp_path / "small")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes_files, "_draw_split", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_shapes(SMALL, folder)
    assert not os.path.exists(folder)
    monkeypatch.undo()
    prepare_shapes(SMALL, folder)
    assert len(files_of(folder)) == 33 and os.listdir(tmp_path).count("small.partial") == 0


def test_processes_that_ask_at_once_share_one_set(tmp_path):
    folder = str(tmp_path / "small")
    with ProcessPoolExecutor(3) as pool:
        for done in [pool.submit(prepare_shapes, SMALL, folder) for _ in range(3)]:
            done.result()
    assert len(files_of(folder)) == 33

"""Faults of a data set, made on purpose: each changes the JSON or the images of a small one."""

import copy
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 40, 30  # width, height
NUMBER = 4


def good_json():
    """What a set without faults holds: four images with two boxes each."""
    images = [
        {"id": i + 1, "file_name": f"{i + 1}.png", "width": SIZE[0], "height": SIZE[1]}
        for i in range(NUMBER)
    ]
    boxes = [[2, 3, 10, 12], [20, 10, 15, 15]]
    annotations = [
        {"id": 10 * image["id"] + k, "image_id": image["id"], "category_id": 1 + k, "bbox": box}
        for image in images
        for k, box in enumerate(boxes)
    ]
    for a in annotations:
        a.update(area=float(a["bbox"][2] * a["bbox"][3]), iscrowd=0)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def write_set(folder: Path, change=lambda data: None, damage=lambda folder: None):
    """Writes images and ``set.json``, changed, into a folder; the path of the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(256, size=(SIZE[1], SIZE[0], 3), dtype=np.uint8)
    for i in range(NUMBER):
        Image.fromarray(pixels).save(folder / f"{i + 1}.png")
    data = copy.deepcopy(good_json())
    change(data)
    path = folder / "set.json"
    path.write_text(json.dumps(data))
    damage(folder)
    return str(path)


def at(*places, value=None, delete=False):
    """A change: deletes or sets what stands at a place."""

    def change(data):
        *parents, key = places
        for parent in parents:
            data = data[parent]
        if delete:
            del data[key]
        else:
            data[key] = value

    return change


def without(*places):
    return at(*places, delete=True)


def as_corners(data):
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x, y, x + w, y + h]


def as_relative(data):
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x / SIZE[0], y / SIZE[1], w / SIZE[0], h / SIZE[1]]


def twice(key, place, other):
    """Gives an entry the id of another."""

    def change(data):
        data[key][place]["id"] = data[key][other]["id"]

    return change


BOX = ("annotations", 3, "bbox")  # of annotation 21
# fault: (change of the JSON, words that are said of it)
IN_JSON = {
    "no annotations": (without("annotations"), "has no 'annotations'"),
    "annotations empty": (at("annotations", value=[]), "'annotations' are empty"),
    "images missing": (without("images"), "'images' is missing"),
    "categories missing": (without("categories"), "'categories' is missing"),
    "box missing": (without(*BOX), "annotation 21 .*no 'bbox'"),
    "box of three numbers": (at(*BOX, value=[1, 2, 3]), r"annotation 21 .*'bbox' is \[1, 2, 3\]"),
    "box of strings": (at(*BOX, value=["1", "2", "3", "4"]), "annotation 21 .*'bbox' is"),
    "box empty": (at(*BOX, value=[]), r"annotation 21 .*'bbox' is \[\]"),
    "box with NaN": (at(*BOX, value=[1, 2, float("nan"), 4]), "annotation 21 .*nan"),
    "box infinite": (at(*BOX, value=[1, 2, float("inf"), 4]), "annotation 21 .*inf"),
    "boxes relative": (as_relative, "annotation 10 .*multiply"),
    "boxes are corners": (as_corners, "annotation .*subtract"),
    "box outside": (at(*BOX, value=[90, 5, 9, 9]), "annotation 21 .*in an image of 40 x 30"),
    "box without area": (at(*BOX, value=[9, 5, 0, 9]), "annotation 21 .*in an image of 40 x 30"),
    "unknown category": (at("annotations", 3, "category_id", value=7), "annotation 21 .*is 7"),
    "unknown image": (at("annotations", 3, "image_id", value=99), "annotation 21 .*is 99"),
    "duplicate annotation id": (twice("annotations", 3, 0), "2 annotations have the 'id' 10"),
    "duplicate image id": (twice("images", 3, 0), "2 images have the 'id' 1"),
    "area missing": (without("annotations", 3, "area"), "annotation 21 .*no 'area'"),
    "iscrowd missing": (without("annotations", 3, "iscrowd"), "annotation 21 .*no 'iscrowd'"),
    "annotation id missing": (without("annotations", 3, "id"), "number 3 of 'annotations'"),
    "annotation id of another kind": (at("annotations", 3, "id", value="x7"), "'id' 'x7'"),
    "annotation id with a decimal point": (
        at("annotations", 3, "id", value=21.0),
        "'id' 21.0.*its own integer",
    ),
    "annotation id 0": (at("annotations", 0, "id", value=0), "'id' 0, by which COCO"),
    "image id NaN": (at("images", 1, "id", value=float("nan")), "number 1 of 'images' .*nan"),
    "annotation id NaN": (at("annotations", 3, "id", value=float("nan")), "'id' nan"),
    "category id too large": (
        lambda data: data["categories"].append({"id": 2**70, "name": "cow"}),
        "number 2 of 'categories'",
    ),
    "box of 400 digits": (at(*BOX, value=[10**400, 0.5, 1, 1]), "annotation 21 .*'bbox' is"),
    "area of 400 digits": (at("annotations", 3, "area", value=10**400), "annotation 21 .*'area'"),
    "width of 400 digits": (at("images", 1, "width", value=10**400), "image 2: 'width' and"),
    "file name missing": (without("images", 1, "file_name"), "image 2: its 'file_name'"),
    "width of half a pixel": (at("images", 1, "width", value=40.5), r"image 2: .*\[40.5, 30\]"),
    "width NaN": (at("images", 1, "width", value=float("nan")), r"image 2: .*\[nan, 30\]"),
    "width missing": (without("images", 1, "width"), r"image 2: .*\[None, 30\]"),
    "image id missing": (without("images", 1, "id"), "number 1 of 'images'"),
    "class without boxes": (
        lambda data: data["categories"].append({"id": 3, "name": "cow"}),
        "'cow' is in 'categories'",
    ),
}
# Which are dubious, but may be meant
DUBIOUS = {
    "annotation id 0",
    "no annotations",
    "annotations empty",
    "box outside",
    "box without area",
    "unknown image",
    "class without boxes",
}


def turned(folder):
    """Rotated by EXIF, as phones do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(folder / "2.png", exif=exif)


def deep(folder):
    pixels = np.full((SIZE[1], SIZE[0]), 4000, dtype=np.uint16)
    Image.fromarray(pixels).save(folder / "2.png")


def truncated(folder):
    os.truncate(folder / "2.png", os.path.getsize(folder / "2.png") // 2)


IN_IMAGES = {
    "image missing": (lambda folder: os.remove(folder / "2.png"), "does not exist"),
    "image truncated": (truncated, "is damaged"),
    "image of 0 bytes": (lambda folder: os.truncate(folder / "2.png", 0), "is empty"),
    "no image": (lambda folder: (folder / "2.png").write_text("text"), "is no image"),
    "another size": (
        lambda folder: Image.new("RGB", (7, 7)).save(folder / "2.png"),
        "is 7 x 7, its annotations say 40 x 30",
    ),
    "16 bits": (deep, "more than 8 bits"),
    "turned by EXIF": (turned, "EXIF orientation 6"),
}

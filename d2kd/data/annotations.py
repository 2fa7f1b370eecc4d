"""What is wrong in annotations in COCO's instances format, looked up in the file itself: what loads
it drops some of these, and ends in a traceback over others.

B boxes are four finite numbers, (x, y, width, height) in pixels.
"""

from collections import Counter
from typing import Any, Iterator, List, Mapping, NamedTuple, Sequence

import numpy as np

from .findings import ERROR, WARNING, Finding, on_annotation
from .masks import finding_on_mask, findings_on_run_lengths
from .values import MAX_COORDINATE, NUMBERS, is_box, is_four_numbers, is_id, is_whole

_IDS = ("id", "image_id", "category_id")
# Pixels by which a box may leave its image: boxes are rounded
_SLACK = 1.0
# Pixels; Detectron2 drops boxes whose width or height is not above it
EMPTY_SIDE = 1e-5
# If this share of a file's boxes look relative, or like corners, the file is told, not each box
_WHOLE_FILE = 0.99
# Corners taken for x, y, width, height: about half of the boxes end this many times their image's
# size away. Fewer than this share, and they are no corners
_FAR, _LEAVING = 1.1, 0.1


class _Boxes(NamedTuple):
    """The boxes that are four finite numbers."""

    values: np.ndarray  # (B, 4)
    sizes: np.ndarray  # (B, 2), width and height of their images
    annotations: Sequence[Mapping[str, Any]]  # B


def check_annotations(
    data: Any, path: str, evaluated: bool = False, masks: str = ""
) -> List[Finding]:
    """
    Args:
        data: what the file holds.
        path: the file, for messages.
        evaluated: COCO's evaluation reads it, and needs more.
        masks: every annotation needs one in this form, as in ``INPUT.MASK_FORMAT``: "polygon", or
            "bitmask", which may be either; empty = none.

    Returns:
        what is wrong, in the order of the file. Without a list of images or of categories nothing
        else is looked up.
    """
    lists = [*_missing_lists(data, path)]
    if any(finding.severity == ERROR for finding in lists):
        return lists
    images, annotations = data["images"], data.get("annotations", [])
    # Where masks are evaluated, tensors of these sizes are made
    integers = evaluated and bool(masks)
    broken_images = [*_images(images, path, integers)]
    findings = [
        *lists,
        *broken_images,
        *_ids(annotations, path, evaluated),
        *_references(data, path),
        *_needed(annotations, path, evaluated, masks),
    ]
    are_boxes = [is_box(a.get("bbox")) for a in annotations]
    findings += [_no_box(a, path) for a, is_box in zip(annotations, are_boxes) if not is_box]
    if not any(finding.severity == ERROR for finding in broken_images):
        findings += findings_on_run_lengths(images, annotations, path, integers) if masks else ()
        with_box = [a for a, is_box in zip(annotations, are_boxes) if is_box]
        findings += _placement(_boxes(images, with_box), path)
    return findings


def _missing_lists(data: Any, path: str) -> Iterator[Finding]:
    remedy = "is it in COCO's instances format?"
    if not isinstance(data, dict):
        text = f"holds a {type(data).__name__}, not an object with 'images' and so on: {remedy}"
        yield Finding("file of another kind", ERROR, path, text)
        return
    for key in ("images", "categories", "annotations"):
        entries = data.get(key)
        if key == "annotations" and key not in data:
            text = "has no 'annotations': detections on it are saved, but nothing is evaluated"
            yield Finding("no annotations", WARNING, path, text)
        elif not isinstance(entries, list):
            found = f"is a {type(entries).__name__}" if key in data else "is missing"
            yield Finding("list missing", ERROR, path, f"the list '{key}' {found}: {remedy}")
        elif not all(isinstance(entry, dict) for entry in entries):
            text = f"not all of '{key}' are objects with keys: {remedy}"
            yield Finding("entry of another kind", ERROR, path, text)
        elif any(isinstance(e.get(k), (list, dict)) for k in _IDS for e in entries):
            text = f"an id in '{key}' is a list or an object, expected a number"
            yield Finding("entry of another kind", ERROR, path, text)
    if data.get("annotations") == []:
        text = "its 'annotations' are empty: there is nothing to learn from or to evaluate against"
        yield Finding("no annotations", WARNING, path, text)


def _images(images: Sequence[Any], path: str, integers: bool) -> Iterator[Finding]:
    """Of the entries of images, not of their files."""
    for position, image in enumerate(images):
        if "id" not in image:
            text = f"number {position} of 'images' has no 'id'"
            yield Finding("image without an id", ERROR, path, text)
            continue
        if not (is_id(image["id"]) or isinstance(image["id"], str)):
            text = (
                f"number {position} of 'images' has the 'id' {image['id']!r:.40}, expected a number"
            )
            yield Finding("image without an id", ERROR, path, text)
            continue
        name, sides = image.get("file_name"), [image.get("width"), image.get("height")]
        if not isinstance(name, str) or not name:
            text = f"its 'file_name' is {name!r}, expected a path below the folder of the images"
            yield Finding("image without a file name", ERROR, path, text, image["id"])
        if not all(is_whole(side) and 0 < side < MAX_COORDINATE for side in sides):
            text = f"'width' and 'height' are {sides}, expected pixels"
            yield Finding("image without a size", ERROR, path, text, image["id"])
        elif integers and float in map(type, sides):
            text = f"'width' and 'height' are {sides}, which the evaluation of masks needs without "
            text += "a decimal point: write integers"
            yield Finding("image without a size", ERROR, path, text, image["id"])
    yield from _twice(images, path, "id", "images", "only one of them would be used")
    consequence = "it would be learned as often"
    yield from _twice(images, path, "file_name", "images", consequence, WARNING)


def _twice(
    entries: Sequence[Mapping[str, Any]],
    path: str,
    key: str,
    what: str,
    consequence: str,
    severity: str = ERROR,
) -> Iterator[Finding]:
    values = [entry[key] for entry in entries if key in entry]
    if len(set(values)) == len(values):
        return
    for value, number in Counter(values).items():
        if number > 1:
            text = f"{number} {what} have the '{key}' {value!r}: {consequence}"
            yield Finding(f"duplicate {key} of {what}", severity, path, text)


def _ids(annotations: Sequence[Mapping[str, Any]], path: str, evaluated: bool) -> Iterator[Finding]:
    # Detectron2 accepts duplicates in COCO's own minival files, which have some
    severity = WARNING if "minival" in path else ERROR
    consequence = "only one of them would be evaluated"
    yield from _twice(annotations, path, "id", "annotations", consequence, severity)
    for position, annotation in enumerate(annotations):
        image = annotation.get("image_id")
        if "id" not in annotation:
            text = f"number {position} of 'annotations' has no 'id': give each its own number"
            yield Finding("annotation without an id", ERROR, path, text, image)
        elif evaluated and not (is_id(annotation["id"]) and type(annotation["id"]) is int):
            text = f"number {position} of 'annotations' has the 'id' {annotation['id']!r:.40}"
            text += ", which COCO's evaluation cannot count: give each its own integer"
            yield Finding("id of an annotation that is no number", ERROR, path, text, image)
        elif evaluated and annotation["id"] == 0:
            text = "has the 'id' 0, by which COCO's evaluation means none: what is found of it "
            text += "counts as wrong; number from 1"
            yield on_annotation("annotation with the id 0", WARNING, path, text, annotation)


def _references(data: Mapping[str, Any], path: str) -> Iterator[Finding]:
    images = {image.get("id") for image in data["images"]}
    names = {category.get("id"): category.get("name") for category in data["categories"]}
    yield from _categories(data["categories"], path)
    annotations = data.get("annotations", [])
    for a in annotations:
        if a.get("category_id") not in names:
            text = f"its 'category_id' is {a.get('category_id')!r}, which no category has"
            yield on_annotation("unknown category", ERROR, path, text, a)
        if a.get("image_id") not in images:
            severity = WARNING if "image_id" in a else ERROR
            text = f"its 'image_id' is {a.get('image_id')!r}, which no image has: it is left out"
            yield on_annotation("annotation of no image", severity, path, text, a)
    used = {a.get("category_id") for a in annotations}
    for name in [name for id, name in names.items() if used and id not in used]:
        text = f"'{name}' is in 'categories', but no annotation has it"
        yield Finding("class without boxes", WARNING, path, text)


def _categories(categories: Sequence[Mapping[str, Any]], path: str) -> Iterator[Finding]:
    if not categories:
        yield Finding("no class", ERROR, path, "its 'categories' are empty: name the classes")
    for position, category in enumerate(categories):
        if not is_id(category.get("id")) or not isinstance(category.get("name"), str):
            text = (
                f"number {position} of 'categories' has no usable 'id' or 'name': {category!r:.80}"
            )
            yield Finding("category without id and name", ERROR, path, text)
    yield from _twice(categories, path, "id", "categories", "only one of them would be used")


def _needed(
    annotations: Sequence[Mapping[str, Any]], path: str, evaluated: bool, masks: str
) -> Iterator[Finding]:
    for key in ("area", "iscrowd") if evaluated else ():
        for a in annotations:
            if key not in a:
                text = f"has no '{key}', which COCO's evaluation needs"
                yield on_annotation(f"annotation without {key}", ERROR, path, text, a)
    for a in annotations:
        mask = finding_on_mask(a, path, evaluated, masks) if masks else None
        yield from (mask, *_numbers(a, path)) if mask else _numbers(a, path)


def _numbers(a: Mapping[str, Any], path: str) -> Iterator[Finding]:
    """What is wrong with the numbers beside an object's box."""
    area = a.get("area", 0)
    if type(area) not in NUMBERS or not -MAX_COORDINATE < area < MAX_COORDINATE:
        text = f"its 'area' is {a['area']!r:.40}, expected square pixels"
        yield on_annotation("area that is no number", ERROR, path, text, a)
    if a.get("iscrowd", 0) not in (0, 1):
        text = f"its 'iscrowd' is {a['iscrowd']!r:.40}, expected 0 or 1"
        yield on_annotation("iscrowd that is not 0 or 1", ERROR, path, text, a)
    if a.get("ignore"):
        text = "has 'ignore', which Detectron2 refuses: remove it, or make it 'iscrowd'"
        yield on_annotation("annotation to be ignored", ERROR, path, text, a)


def _no_box(a: Mapping[str, Any], path: str) -> Finding:
    expected = "expected [x, y, width, height] in pixels"
    if "bbox" not in a:
        return on_annotation("box missing", ERROR, path, f"has no 'bbox', {expected}", a)
    box = a["bbox"]
    kind = "box that is not finite" if is_four_numbers(box) else "box that is not four numbers"
    return on_annotation(kind, ERROR, path, f"'bbox' is {box!r:.80}, {expected}", a)


def _boxes(images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]]) -> _Boxes:
    """
    Args:
        annotations: whose boxes are four finite numbers.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    placed = [a for a in annotations if a.get("image_id") in sizes]
    values = np.array([a["bbox"] for a in placed], dtype=np.float64).reshape(-1, 4)
    image_sizes = np.array([sizes[a["image_id"]] for a in placed], dtype=np.float64)
    return _Boxes(values, image_sizes.reshape(-1, 2), placed)


def _placement(boxes: _Boxes, path: str) -> Iterator[Finding]:
    """Boxes that are numbers, but not where a box should be."""
    if not len(boxes.values):
        return
    corner, sides, sizes = boxes.values[:, :2], boxes.values[:, 2:], boxes.sizes
    end = corner + sides
    relative = (boxes.values >= 0).all(1) & (boxes.values <= 1).all(1) & (sizes > 2).all(1)
    as_corners = (corner >= 0).all(1) & (sides > corner).all(1) & (sides <= sizes + _SLACK).all(1)
    leaves = ((corner < -_SLACK) | (end > sizes + _SLACK)).any(1)
    far = (end > _FAR * sizes).any(1) & leaves
    if _mostly(relative):
        yield _whole("boxes relative to the image", path, boxes, relative, "multiply by its size")
        return
    if _mostly(as_corners & ~relative) and far.mean() >= _LEAVING:
        remedy = "subtract x1 and y1 from the last two numbers"
        yield _whole("boxes that are corners x1, y1, x2, y2", path, boxes, far, remedy)
        return
    empty = (sides <= EMPTY_SIDE).any(1)
    outside = (np.minimum(end, sizes) - np.maximum(corner, 0) <= EMPTY_SIDE).any(1)
    corners = as_corners & far
    for kind, which in (
        ("box between 0 and 1, perhaps relative", relative & ~empty),
        ("box without area", empty),
        ("box outside of its image", outside & ~empty),
        ("box that leaves its image, perhaps corners", corners & ~outside & ~empty),
        ("box that leaves its image", leaves & ~corners & ~outside & ~empty),
    ):
        for i in np.flatnonzero(which).tolist():
            yield on_annotation(kind, WARNING, path, _described(boxes, i), boxes.annotations[i])


def _mostly(which: np.ndarray) -> bool:
    return bool(which.mean() >= _WHOLE_FILE)


def _described(boxes: _Boxes, i: int) -> str:
    width, height = boxes.sizes[i].astype(int).tolist()
    box = ", ".join(f"{x:g}" for x in boxes.values[i])
    return f"'bbox' is [{box}] in an image of {width} x {height}"


def _whole(kind: str, path: str, boxes: _Boxes, which: np.ndarray, remedy: str) -> Finding:
    i = int(np.flatnonzero(which)[0])
    text = f"{_described(boxes, i)}, and the others are alike, expected [x, y, width, height] in"
    return on_annotation(kind, ERROR, path, f"{text} pixels: {remedy}", boxes.annotations[i])

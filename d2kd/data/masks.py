"""What is wrong with the masks of annotations in COCO's instances format."""

import numbers
from typing import Any, Iterator, List, Mapping, Optional, Sequence

import numpy as np

from .findings import ERROR, WARNING, Finding, on_annotation
from .values import MAX_COORDINATE, is_whole


def finding_on_mask(
    a: Mapping[str, Any], path: str, evaluated: bool, form: str
) -> Optional[Finding]:
    """What is wrong with the mask of an object.

    Args:
        form: in which it is needed, "polygon" or "bitmask".
    """
    mask = a.get("segmentation")
    if mask is not None and not isinstance(mask, (list, dict)):
        text = f"'segmentation' is a {type(mask).__name__}, expected polygons or run lengths"
        return on_annotation("mask that is none", ERROR, path, text, a)
    if not mask:
        text = "has no 'segmentation', which MODEL.MASK_ON needs"
        return on_annotation("annotation without segmentation", ERROR, path, text, a)
    if isinstance(mask, dict):
        if form == "bitmask" or a.get("iscrowd"):
            return None
        text = "'segmentation' is in run lengths: set INPUT.MASK_FORMAT to bitmask"
        return on_annotation("mask in run lengths", ERROR, path, text, a)
    if not _are_polygons(mask):
        text = f"'segmentation' is {mask!r:.60}, expected polygons, [[x1, y1, x2, ...], ...]"
        return on_annotation("mask that is none", ERROR, path, text, a)
    if not any(map(_has_area, mask)):
        text = f"'segmentation' is {mask!r:.60}, of which none has three or more points"
        if evaluated:
            return on_annotation("mask that is none", ERROR, path, text, a)
        text += ": Detectron2 trains without this object"
        return on_annotation("mask without area", WARNING, path, text, a)
    if evaluated and len(mask[0]) <= 4:
        text = f"'segmentation' is {mask!r:.60}: COCO's evaluation takes the first for a box"
        return on_annotation("mask that is none", ERROR, path, text, a)
    return None


def _are_polygons(mask: Sequence[Any]) -> bool:
    """Whether each is a list of numbers; of a registered set they may be NumPy's."""
    return all(
        isinstance(polygon, (list, tuple, np.ndarray))
        and all(issubclass(kind, numbers.Real) for kind in set(map(type, polygon)))
        and all(-MAX_COORDINATE < value < MAX_COORDINATE for value in polygon)
        for polygon in mask
    )


def _has_area(polygon: Sequence[float]) -> bool:
    """Whether Detectron2 takes a polygon."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def findings_on_run_lengths(
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    path: str,
    integers: bool,
) -> Iterator[Finding]:
    """Masks as run lengths: decoded, they have the size that they say."""
    sizes = {image["id"]: [image["height"], image["width"]] for image in images}
    for a in annotations:
        mask, size = a.get("segmentation"), sizes.get(a.get("image_id"))
        if isinstance(mask, dict) and size and not _is_mask(mask, size, integers):
            text = f"'segmentation' is {mask!r:.60}, expected 'counts' and the 'size' {size}"
            text += ", in integers" * integers
            yield on_annotation("mask that is none", ERROR, path, text, a)


def _is_mask(mask: Mapping[str, Any], size: List[int], integers: bool) -> bool:
    """Whether it is run lengths of a mask (H, W) of a size."""
    counts = mask.get("counts")
    lengths = counts if isinstance(counts, list) else []
    if not all(is_whole(x) and x >= 0 for x in lengths):
        return False
    if mask.get("size") != size or (integers and float in map(type, [*mask["size"], *lengths])):
        return False
    # pycocotools encodes to bytes, which are text in a JSON
    return sum(lengths) == size[0] * size[1] if lengths else isinstance(counts, (str, bytes))

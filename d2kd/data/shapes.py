"""Shapes: a detection data set that is drawn, not downloaded.

Every image is a function of (seed, split, index) alone, so the set is the same whatever the order
or number of processes that draw it. Only the outline tells the class: colour and texture do not.

Letters: H, W image height and width; h, w height and width of a patch.
"""

from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Tuple

import cv2
import numpy as np

from .outlines import OUTLINES, polar

VERSION = 1  # of the drawing; raise it whenever a pixel or a box changes
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ShapesSpec:
    """What one size of the data set looks like. Ranges are inclusive.

    Attributes:
        classes: names of outlines in ``OUTLINES``; the category id is the position + 1.
        sizes: (width, height) in pixels; an image has one of them.
        radius: pixels, of the circle around a shape; drawn log-uniformly.
        objects: how many shapes are placed in an image (fewer fit rarely).
        clutter: how many unannotated irregular patches and sticks lie behind the shapes.
        occluders: how many thin sticks lie over the shapes.
        images: number of images of each split.
    """

    name: str
    classes: Tuple[str, ...]
    sizes: Tuple[Tuple[int, int], ...]
    radius: Tuple[float, float]
    objects: Tuple[int, int]
    clutter: Tuple[int, int]
    occluders: Tuple[int, int]
    images: Dict[str, int]


TINY_CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")

SHAPES_TINY = ShapesSpec(
    name="shapes_tiny",
    classes=TINY_CLASSES,
    sizes=((128, 128),),
    radius=(12, 45),
    objects=(1, 3),
    clutter=(0, 0),
    occluders=(0, 0),
    images={"train": 2000, "val": 250},
)
SHAPES = ShapesSpec(
    name="shapes",
    classes=TINY_CLASSES + ("ellipse", "pentagon", "semicircle", "crescent", "arrow", "frame"),
    sizes=((320, 256), (256, 320), (288, 288)),
    radius=(7, 100),
    objects=(2, 9),
    clutter=(4, 12),
    occluders=(0, 3),
    images={"train": 10000, "val": 1000},
)
SPECS = {spec.name: spec for spec in (SHAPES_TINY, SHAPES)}


class Shape(NamedTuple):
    """An object that was drawn; coordinates are pixels, (0, 0) the corner of the first pixel.

    Attributes:
        label: index of its class.
        box: xyxy, tight around the outline.
        contours: of the outline, each (V, 2) xy; a second contour is a hole.
    """

    label: int
    box: np.ndarray
    contours: List[np.ndarray]


MAX_OVERLAP = 0.3  # of two boxes' intersection over the smaller box
PLACEMENT_TRIES = 20
MIN_CONTRAST = 70.0  # Euclidean distance of two colours, 0–255 per channel
NOISE = 6.0  # standard deviation, 0–255


def _rotation(rng) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _cover(contours: List[np.ndarray], x0: int, y0: int, w: int, h: int) -> np.ndarray:
    """Share of each pixel that lies inside the contours, (h, w) in [0, 1], by 4 × 4 samples."""
    scale, shift = 4, 4
    # OpenCV's integer coordinates are centres of pixels, ours are corners.
    points = [(c - (x0, y0)) * scale - 0.5 for c in contours]
    fixed = [np.rint(p * 2**shift).astype(np.int32) for p in points]
    mask = np.zeros((h * scale, w * scale), np.uint8)
    cv2.fillPoly(mask, fixed, 255, shift=shift)
    return cv2.resize(mask, (w, h), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _texture(rng, w: int, h: int) -> np.ndarray:
    """Mix of two colours per pixel, (h, w) or a scalar, in [0, 1]: one of six textures."""
    kind, period = rng.integers(6), rng.uniform(5, 12)
    grid = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1) @ _rotation(rng) / period
    u, v = grid[..., 0], grid[..., 1]
    if kind == 0:  # plain
        return np.float32(0)
    if kind == 1:  # stripes
        return (u % 1 < 0.5).astype(np.float32)
    if kind == 2:  # checker
        return (np.floor(u) + np.floor(v)).astype(np.float32) % 2
    if kind == 3:  # dots
        return ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1).astype(np.float32)
    if kind == 4:  # gradient
        return ((u - u.min()) / max(np.ptp(u), 1e-6)).astype(np.float32)
    blobs = rng.random((h // 3 + 2, w // 3 + 2), dtype=np.float32)
    return cv2.resize(blobs, (w, h), interpolation=cv2.INTER_LINEAR)  # speckle


def _colour_far_from(rng, other: np.ndarray) -> np.ndarray:
    """A colour, (3,), at least MIN_CONTRAST from the given one (or the farthest of 16 tried)."""
    tried = rng.uniform(0, 255, (16, 3))
    distance = np.linalg.norm(tried - other, axis=1)
    return tried[np.argmax(np.minimum(distance, MIN_CONTRAST))]


def _paint(rng, image: np.ndarray, contours: List[np.ndarray]) -> None:
    """Fill contours, in pixels, with a random texture, in place on the (H, W, 3) float image."""
    height, width = image.shape[:2]
    low = np.maximum(np.floor(contours[0].min(0)).astype(int), 0)
    high = np.minimum(np.ceil(contours[0].max(0)).astype(int), (width, height))
    (x0, y0), (w, h) = low.tolist(), (high - low).tolist()
    if w <= 0 or h <= 0:
        return
    patch = image[y0 : y0 + h, x0 : x0 + w]
    first = _colour_far_from(rng, patch.mean((0, 1)))
    second = _colour_far_from(rng, first)
    mix = _texture(rng, w, h)[..., None]
    fill = (first + mix * (second - first)).astype(np.float32)
    patch += _cover(contours, x0, y0, w, h)[..., None] * (fill - patch)


def _background(rng, width: int, height: int) -> np.ndarray:
    grid = rng.uniform(50, 205, 3) + rng.uniform(-40, 40, (4, 4, 3))
    return cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)


def _stick(rng) -> np.ndarray:
    return np.array([(1, 0.04), (-1, 0.04), (-1, -0.04), (1, -0.04)]) @ _rotation(rng)


def _rock(rng) -> np.ndarray:
    corners = rng.integers(6, 10)
    return polar(np.sort(rng.uniform(0, 2 * np.pi, corners)), rng.uniform(0.25, 1, corners))


def _scatter(rng, image: np.ndarray, spec: ShapesSpec, outlines, number) -> None:
    """Paint unannotated outlines anywhere, also across the border."""
    size = (image.shape[1], image.shape[0])
    for _ in range(rng.integers(number[0], number[1] + 1)):
        outline = outlines[rng.integers(len(outlines))](rng)
        radius = rng.uniform(spec.radius[0], spec.radius[1] / 2)
        _paint(rng, image, [outline * radius + rng.uniform(0, size)])


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over the smaller of two boxes, (4,) and (N, 4) xyxy → (N,)."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    smaller = np.minimum(np.prod(box[2:] - box[:2]), np.prod(others[:, 2:] - others[:, :2], 1))
    return np.prod(np.maximum(high - low, 0), 1) / smaller


def _place(rng, spec: ShapesSpec, width: int, height: int, boxes: List[np.ndarray]):
    """A random shape, wholly inside the image, that overlaps little with the boxes so far.

    Returns:
        a ``Shape``, or None when no free place was met.
    """
    label = int(rng.integers(len(spec.classes)))
    radius = np.exp(rng.uniform(*np.log(spec.radius)))
    turn = radius * _rotation(rng)
    contours = [c @ turn for c in OUTLINES[spec.classes[label]]]
    extent = np.concatenate([contours[0].min(0), contours[0].max(0)])
    for _ in range(PLACEMENT_TRIES):
        centre = rng.uniform(radius, (width - radius, height - radius))
        box = extent + np.tile(centre, 2)
        if not boxes or _overlap(box, np.stack(boxes)).max() <= MAX_OVERLAP:
            return Shape(label, box, [c + centre for c in contours])
    return None


def draw_image(
    spec: ShapesSpec, seed: int, split: str, index: int
) -> Tuple[np.ndarray, List[Shape]]:
    """Draws one image.

    Args:
        seed: of the whole data set.
        split: one of ``SPLITS``.
        index: position of the image in its split.

    Returns:
        the image, (H, W, 3) uint8, and its objects, a list of ``Shape``. Contours and box are those
        of the whole outline, also where another shape or a stick covers a part of it (two boxes
        overlap by at most 30 % of the smaller), and never leave the image.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    width, height = spec.sizes[rng.integers(len(spec.sizes))]
    image = _background(rng, width, height)
    _scatter(rng, image, spec, (_rock, _stick), spec.clutter)
    objects = []
    for _ in range(rng.integers(spec.objects[0], spec.objects[1] + 1)):
        placed = _place(rng, spec, width, height, [shape.box for shape in objects])
        if placed is not None:
            _paint(rng, image, placed.contours)
            objects.append(placed)
    _scatter(rng, image, spec, (_stick,), spec.occluders)
    image += NOISE * rng.standard_normal(image.shape, dtype=np.float32)
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8), objects

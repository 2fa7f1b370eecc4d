"""Outlines of the shapes that are drawn: polygons of V vertices inside the unit circle."""

from typing import List

import numpy as np


def polar(angles, radii=1.0) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.reshape(radii, (-1, 1))


def _regular(corners: int, radius: float = 1.0) -> np.ndarray:
    return polar(np.arange(corners) * (2 * np.pi / corners), radius)


def keyhole(contours: List[np.ndarray]) -> np.ndarray:
    """One polygon, (V, 2), of an outer contour and, if there is a second one, the hole in it.

    A polygon of COCO has no holes: this one goes round the outside, along a seam to the hole, round
    it in the other direction and back along the seam, which has no area.
    """
    if len(contours) == 1:
        return contours[0]
    outer, hole = contours
    return np.concatenate([outer, outer[:1], hole[:1], hole[::-1]])


def _unit(points) -> np.ndarray:
    points = np.asarray(points, dtype=float)
    return points / np.linalg.norm(points, axis=1).max()


def _crescent() -> np.ndarray:
    """The unit disc without the disc of radius 0.75 around (0.5, 0)."""
    x = 0.6875  # of the two points that both circles share
    outer, inner = np.arccos(x), np.arctan2(np.sqrt(1 - x * x), x - 0.5)
    return np.concatenate(
        [
            polar(np.linspace(outer, 2 * np.pi - outer, 48)),
            (0.5, 0) + polar(np.linspace(2 * np.pi - inner, inner, 48), 0.75),
        ]
    )


_ARM = 0.33
# Contours, each (V, 2), inside the unit circle; a second contour is a hole.
OUTLINES = {
    "circle": [_regular(64)],
    "square": [_regular(4)],
    "triangle": [_regular(3)],
    "star": [polar(np.arange(10) * (np.pi / 5), np.tile([1.0, 0.45], 5))],
    "ring": [_regular(64), _regular(64, 0.55)],
    "cross": [
        _unit(
            [(1, _ARM), (_ARM, _ARM), (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM)]
            + [(-1, -_ARM), (-_ARM, -_ARM), (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM)]
        )
    ],
    "ellipse": [_regular(64) * (1, 0.55)],
    "pentagon": [_regular(5)],
    "semicircle": [polar(np.linspace(0, np.pi, 33))],
    "crescent": [_crescent()],
    "arrow": [_unit([(1, 0), (0, 0.8), (0, 0.3), (-1, 0.3), (-1, -0.3), (0, -0.3), (0, -0.8)])],
    "frame": [_regular(4), _regular(4, 0.6)],
}

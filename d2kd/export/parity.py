"""Whether a program finds what the detector finds.

Shapes: N detections.
"""

from typing import List, NamedTuple, Sequence, Tuple

import numpy as np

from d2kd.errors import UserError

from .detections import Detections


class Tolerance(NamedTuple):
    """How far apart two detections of the same class may be, to count as one."""

    box: float  # pixels, of each side
    score: float
    unmatched: float  # share of all detections that may lack a counterpart


# NMS and thresholds decide on numbers, which differ in the last bits: once in a while a detection
# is kept by one and not by the other.
FULL = Tolerance(box=0.05, score=1e-3, unmatched=0.01)
HALF = Tolerance(box=4.0, score=0.03, unmatched=0.1)


class Parity(NamedTuple):
    """The outcome of a comparison over several images."""

    sizes: Tuple[Tuple[int, int], ...]  # (height, width) of the images
    detections: int  # of the detector
    unmatched: int  # of the detector and of the program, without a counterpart
    box_error: float  # pixels, the worst of matched detections
    score_error: float
    mask_error: float

    def summary(self) -> str:
        """In one line for people."""
        apart = f"{self.unmatched} without a counterpart, " if self.unmatched else ""
        mask = f", of a mask {self.mask_error:.1e}" if self.mask_error else ""
        return (
            f"{self.detections} detections in {len(self.sizes)} images, {apart}worst error of a "
            f"box {self.box_error:.1e} pixels, of a score {self.score_error:.1e}{mask}"
        )


class _Errors(NamedTuple):
    unmatched: int
    box: float
    score: float
    mask: float


def check_parity(
    expected: Sequence[Detections],
    found: Sequence[Detections],
    sizes: Sequence[Tuple[int, int]],
    tolerance: Tolerance,
) -> Parity:
    """
    Args:
        expected: of the detector, per image.
        found: of the program.
        sizes: (height, width) of the images.
        tolerance: what is allowed.

    Raises:
        UserError: if they differ by more.
    """
    errors = [_compare(a, b, tolerance) for a, b in zip(expected, found)]
    total = sum(len(x.scores) for x in expected)
    parity = Parity(
        sizes=tuple(sizes),
        detections=total,
        unmatched=sum(e.unmatched for e in errors),
        box_error=max(e.box for e in errors),
        score_error=max(e.score for e in errors),
        mask_error=max(e.mask for e in errors),
    )
    if parity.unmatched > tolerance.unmatched * total:
        worst = max(range(len(errors)), key=lambda i: errors[i].unmatched)
        height, width = sizes[worst]
        raise UserError(
            f"the exported program is not the detector, nothing is written: {parity.summary()}; "
            f"most of them in an image of {height} x {width}, where the detector finds "
            f"{len(expected[worst].scores)} and the program {len(found[worst].scores)}"
        )
    return parity


def _compare(expected: Detections, found: Detections, tolerance: Tolerance) -> _Errors:
    pairs = match(expected, found, tolerance)
    a, b = (np.array([pair[i] for pair in pairs], dtype=int) for i in (0, 1))
    return _Errors(
        unmatched=len(expected.scores) + len(found.scores) - 2 * len(pairs),
        box=_largest(expected.boxes[a], found.boxes[b]),
        score=_largest(expected.scores[a], found.scores[b]),
        mask=0.0 if expected.masks is None else _largest(expected.masks[a], found.masks[b]),
    )


def match(expected: Detections, found: Detections, tolerance: Tolerance) -> List[Tuple[int, int]]:
    """Pairs of detections of one class, nearest boxes first. Their order does not count: equal
    scores are sorted in any.

    Returns:
        pairs of indices; each detection is in one at most.
    """
    box = np.abs(expected.boxes[:, None] - found.boxes[None]).max(axis=2, initial=0)  # (N, N')
    score = np.abs(expected.scores[:, None] - found.scores[None])
    same = expected.classes[:, None] == found.classes[None]
    near = np.argwhere(same & (box <= tolerance.box) & (score <= tolerance.score))
    pairs: List[Tuple[int, int]] = []
    used: Tuple[set, set] = (set(), set())
    for i, j in sorted(near.tolist(), key=lambda pair: box[pair[0], pair[1]]):
        if i not in used[0] and j not in used[1]:
            pairs.append((i, j))
            used[0].add(i)
            used[1].add(j)
    return pairs


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max(initial=0.0))

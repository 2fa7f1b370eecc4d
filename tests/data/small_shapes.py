"""A handful of small drawn images of several shapes, for tests that need files."""

from dataclasses import replace

from d2kd.data.shapes import SHAPES_TINY

SMALL = replace(
    SHAPES_TINY,
    name="small",
    sizes=((64, 48), (48, 64), (56, 56)),
    radius=(8, 18),
    clutter=(1, 3),
    occluders=(0, 2),
    images={"train": 24, "val": 6},
)

"""Fixtures for tests that train."""

import dataclasses
import logging

import pytest

from d2kd.data.builtin import register_shapes
from d2kd.data.shapes import SPECS


@pytest.fixture(autouse=True)
def logs_can_be_captured():
    """A run that was set up in this process keeps its log messages to itself."""
    logging.getLogger("d2kd").propagate = True


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory):
    """Registers a data set of few images and two orientations; returns the names of its splits."""
    tiny = SPECS["shapes_tiny"]
    spec = dataclasses.replace(
        tiny, name="toy", sizes=((96, 64), (64, 96)), radius=(8, 20), images={"train": 24, "val": 6}
    )
    register_shapes(spec, str(tmp_path_factory.mktemp("datasets")))
    return "toy_train", "toy_val"

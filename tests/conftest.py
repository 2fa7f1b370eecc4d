"""Fixtures for tests that train."""

import logging

import pytest
from small_run import TOY

from d2kd.data.builtin import register_shapes


@pytest.fixture(autouse=True)
def logs_can_be_captured():
    """A run that was set up in this process keeps its log messages to itself."""
    logging.getLogger("d2kd").propagate = True


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory):
    """Registers a data set of few images and two orientations; returns the names of its splits."""
    register_shapes(TOY, str(tmp_path_factory.mktemp("datasets")))
    return "toy_train", "toy_val"

"""What happens to a run from outside, in one line."""

import errno

import pytest
import torch
from detectron2.utils import comm

from d2kd.engine.failures import as_user_error
from d2kd.errors import UserError

# What gloo said of a process that was stopped, in one of 26 cases without its own name
GLOO = [
    "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out",
    "Application timeout caused pair closure",
]


@pytest.mark.parametrize("text", GLOO)
def test_a_process_that_does_not_answer(monkeypatch, text):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="does not answer .*add --resume"), as_user_error("run"):
        raise RuntimeError(text)


@pytest.mark.parametrize("text", GLOO)
def test_one_process_waits_for_none(text):
    with pytest.raises(RuntimeError, match=text[-10:]) as error, as_user_error("run"):
        raise RuntimeError(text)
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "run"),
        (RuntimeError("DataLoader worker (pid 7) is killed. More."), "out of memory"),
        (torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB. More."), "SOLVER.IMS_PER_BATCH"),
    ],
)
def test_what_the_machine_lacks(error, words):
    with pytest.raises(UserError, match=words), as_user_error("run"):
        raise error


def test_an_error_of_the_code_stays_one():
    with pytest.raises(RuntimeError, match="shapes"), as_user_error("run"):
        raise RuntimeError("shapes do not fit")

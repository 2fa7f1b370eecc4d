"""Pickles that describe more than can be held are refused before they are unpickled."""

import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from d2kd.checkpoint import read_weights
from d2kd.checkpoint.files import read_file
from d2kd.errors import UserError


def refused(path):
    """What is said of a file."""
    with pytest.raises(UserError) as error:
        read_weights(nn.Linear(2, 2), str(path), "MODEL.WEIGHTS")
    assert "\n" not in str(error.value)
    return str(error.value)


def _memo(index):
    return b"r" + struct.pack("<I", index)


TWICE_45_TIMES = b"K\x01K\x01\x86" + b"2\x86" * 45
ENDLESS = {
    "a key nested 3 million deep": (b"(" + b")" + b"\x85" * 3_000_000 + b"K\x01u.", "200 deep"),
    "a value nested 3 million deep": (b"(K\x01)" + b"\x85" * 3_000_000 + b"u.", "200 deep"),
    "a tuple of twice the same": (b"(K\x01" + TWICE_45_TIMES + b"u.", "10,000,000 values"),
    "a key of twice the same": (b"(" + TWICE_45_TIMES + b"K\x01u.", "10,000,000 values"),
    "a memo of gigabytes": (_memo(2**28) + b".", "names its value 268435456"),
}


@pytest.mark.parametrize("kind", ["pickle", "old torch", "zip"])
@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_never_end_or_fill_the_memory_is_refused(tmp_path, name, kind):
    content, said = ENDLESS[name]
    data = b"\x80\x02}" + content
    path = tmp_path / "model.pth"
    if kind == "pickle":
        path.write_bytes(data)
    elif kind == "old torch":
        torch.save({}, path, _use_new_zipfile_serialization=False)
        written = path.read_bytes()
        path.write_bytes(written.replace(b"\x80\x02}q\x00.", data))
        assert len(path.read_bytes()) > len(written)
    else:
        torch.save({}, tmp_path / "plain.pth")
        with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w") as new:
            for record in plain.namelist():
                is_data = record.endswith("data.pkl")
                new.writestr(record, data if is_data else plain.read(record))
    assert said in refused(path)


def test_a_list_that_grows_after_it_was_named_counts(tmp_path):
    """Within a tuple of itself, or filled when the tuple is made already."""
    grown = b"]" + _memo(1) + b"]\x85a"  # [([],)], then itself appended 300 deep
    deeper = b"".join(
        b"]" + _memo(i) + b"j" + struct.pack("<I", i - 1) + b"a" for i in range(2, 300)
    )
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02" + grown + deeper + b".")
    assert "200 deep" in refused(tmp_path / "x.pkl")


def test_arrays_that_occur_twice_are_the_same(tmp_path):
    shared = [np.arange(3.0)]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": shared, "b": shared}, protocol=2))
    data, _ = read_file(str(tmp_path / "x.pkl"))
    assert data["a"] is data["b"] and data["a"][0].tolist() == [0, 1, 2]

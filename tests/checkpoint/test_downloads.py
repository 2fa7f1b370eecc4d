"""Weights from the network: files that did not arrive whole, and machines without a network."""

import hashlib
import os

import pytest
import torch
from torch import nn

from d2kd.checkpoint import read_weights
from d2kd.errors import UserError

KEY = "MODEL.WEIGHTS"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where downloads are kept."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(folder, digits=None):
    """A file with a hash in its name, its own by default."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": nn.Linear(2, 2).state_dict()}, folder / "x.pth")
    digits = digits or hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
    path = folder / f"retinanet_20200131-{digits}.pth"
    os.rename(folder / "x.pth", path)
    return path


def test_a_download_is_compared_with_the_hash_in_its_name(cache):
    whole, other = save(cache / "a"), save(cache / "b", digits="5560aee8")
    model = nn.Linear(2, 2)
    assert read_weights(model, f"https://host.test/a/{whole.name}", KEY) == []
    address = f"https://host.test/b/{other.name}"
    with pytest.raises(UserError) as error:
        read_weights(model, address, KEY)
    assert str(error.value).startswith(f"{KEY} is '{address}': the download is damaged: ")
    assert f"{other} is " in str(error.value) and "not 5560aee8" in str(error.value)
    assert "delete it and start again" in str(error.value)


def test_a_file_of_ones_own_is_read_with_a_warning(tmp_path, caplog):
    assert read_weights(nn.Linear(2, 2), str(save(tmp_path)), KEY) == []
    assert "SHA-256" not in caplog.text
    assert read_weights(nn.Linear(2, 2), str(save(tmp_path, digits="5560aee8")), KEY) == []
    assert "not as it was published: its SHA-256" in caplog.text


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_without_a_network_the_place_for_the_file_is_named(cache, scheme):
    address = f"{scheme}://127.0.0.1:9/v2.0/x/retinanet-5560aee8.pth"
    with pytest.raises(UserError) as error:
        read_weights(nn.Linear(2, 2), address, KEY)
    place = os.path.join(str(cache), "v2.0/x/retinanet-5560aee8.pth")
    assert str(error.value).startswith(f"{KEY} is '{address}': ")
    ending = f"; download {address} elsewhere, and put it at {place} or give its path as {KEY}"
    assert str(error.value).endswith(ending) and "\n" not in str(error.value)
    os.rename(save(cache / "v2.0" / "x"), place)  # what the message asks for
    with pytest.raises(UserError, match="the download is damaged"):  # it is another file, though
        read_weights(nn.Linear(2, 2), address, KEY)


def test_addresses_of_detectron2_are_spelled_out(cache, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("iopath.common.file_io.download", offline)
    place = os.path.join(str(cache), "detectron2/ImageNetPretrained/MSRA/R-50.pkl")
    with pytest.raises(UserError) as error:
        read_weights(nn.Linear(2, 2), "detectron2://ImageNetPretrained/MSRA/R-50.pkl", KEY)
    assert str(error.value) == (
        f"{KEY} is 'detectron2://ImageNetPretrained/MSRA/R-50.pkl': no route to host; download "
        "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl elsewhere, and "
        f"put it at {place} or give its path as {KEY}"
    )

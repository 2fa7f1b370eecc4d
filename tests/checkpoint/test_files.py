"""Files of every kind are read as data: nothing in them is run, and what is wrong is said."""

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from d2kd.checkpoint import read_weights, refuse_missing
from d2kd.checkpoint.files import Unreadable, read_file
from d2kd.checkpoint.weights import SafeCheckpointer
from d2kd.errors import UserError

# Torch's own errors end with it
ADVICE = ("weights_only", "add_safe_globals", "arbitrary code", "trust")
KEY = "DISTILL.TEACHER.WEIGHTS"


def network():
    torch.manual_seed(0)
    layers = [("conv", nn.Conv2d(3, 4, 3)), ("norm", nn.BatchNorm2d(4)), ("fc", nn.Linear(4, 2))]
    return nn.Sequential(collections.OrderedDict(layers))


class RunsCode:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(path):
    """The one line that a user sees."""
    with pytest.raises(UserError) as error:
        read_weights(network(), str(path), KEY)
    message = str(error.value)
    assert message.startswith(f"{KEY} is '{path}': ") and "\n" not in message
    assert not any(word in message for word in ADVICE)
    return message


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("name", ["model.pth", "model.pyth", "model.pkl", "model"])
def test_both_formats_of_torch_whatever_the_name(tmp_path, name, zip_format):
    model = network()
    state = model.state_dict()
    file = {"model": state, "iteration": 7}
    torch.save(file, tmp_path / name, _use_new_zipfile_serialization=zip_format)
    other = network()
    nn.init.zeros_(other.conv.weight)
    assert read_weights(other, str(tmp_path / name), KEY) == []
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values()))


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("name", ["model.pth", "model.pyth", "model.pkl"])
def test_code_in_a_file_of_torch_is_named_and_not_run(tmp_path, name, zip_format):
    marker = tmp_path / "run"
    file = {"model": network().state_dict(), "meta": RunsCode(marker)}
    torch.save(file, tmp_path / name, _use_new_zipfile_serialization=zip_format)
    message = refused(tmp_path / name)
    assert "holds objects that d2kd does not read: posix.mkdir; nothing in a file is run" in message
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["model.pth", "model.pyth", "model.pkl"])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, name, protocol):
    marker = tmp_path / "run"
    data = {"model": {"x": np.zeros(2)}, "__author__": "x", "more": RunsCode(marker)}
    (tmp_path / name).write_bytes(pickle.dumps(data, protocol=protocol))
    assert "does not read: posix.mkdir; nothing in a file is run" in refused(tmp_path / name)
    assert not marker.exists()


BUILTIN = [
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"cbuiltins\ngetattr\n(cbuiltins\nset\nS'__init__'\ntR.",
    b"cnumpy\nload\n(S'x'\ntR.",
    b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n(dtR.",
    b"ctorch.storage\n_load_from_bytes\n(S'1'\ntR.",
    b"ccollections\nOrderedDict.__init__\n.",
    b"\x80\x02\x82\x01.",  # an extension registered by code
    b"Pid\n.",  # data outside the pickle
    b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.",
]


@pytest.mark.parametrize("data", BUILTIN)
def test_other_ways_into_a_pickle(tmp_path, data):
    path = tmp_path / "model.pkl"
    path.write_bytes(data)
    with pytest.raises(Unreadable):
        read_file(str(path))


class Reduced:
    """Makes a pickle call a function with arguments, then set a state."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_arrays_with_forged_states_are_refused(tmp_path):
    """numpy's own unpickling of these would take any pointer, or objects."""
    dtype = Reduced(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 63))
    fields = Reduced(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": 1}, 8, 1, 0))
    reconstruct = np.zeros(1).__reduce__()[0]
    short = Reduced(reconstruct, (np.ndarray, (0,), b"b"), (1, (99,), np.dtype("f4"), False, b"ab"))
    for number, forged in enumerate((dtype, fields, short, np.array([object()], dtype=object))):
        path = tmp_path / f"{number}.pkl"
        try:
            path.write_bytes(pickle.dumps({"x": forged}, protocol=2))
        except (pickle.PicklingError, AttributeError):
            continue
        with pytest.raises(Unreadable):
            read_file(str(path))


ARRAYS = {
    "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
    "by column": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">i4"),
    "empty": np.zeros((0, 4)),
    "one number": np.array(3.5),
    "half": np.arange(3, dtype=np.float16),
    "bool": np.array([True, False]),
    "scalar": np.float32(1.5),
    "bytes": b"\x00\xff",
    "containers": [(1, 2.5), {"a": None}, "text", {3}],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_come_back(tmp_path, protocol):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(collections.OrderedDict(ARRAYS), protocol=protocol))
    read, is_pickle = read_file(str(path))
    assert is_pickle and list(read) == list(ARRAYS)
    for name, value in ARRAYS.items():
        if isinstance(value, (np.ndarray, np.generic)):
            assert read[name].shape == value.shape and read[name].dtype.kind == value.dtype.kind
            assert np.array_equal(read[name], value)
        else:
            assert read[name] == value
    read["floats"][0, 0] = 7  # torch warns of arrays that cannot be written


# {"conv1_w": numpy.arange(4, dtype=float32).reshape(2, 2), "conv1_w_momentum": ...} as Python 2
# pickled it with numpy 1, protocol 2: Detectron's files
PYTHON_2 = (
    b"\x80\x02}q\x00(U\x07conv1_wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\n"
    b"q\x03K\x00\x85U\x01b\x87Rq\x04(K\x01K\x02K\x02\x86cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87R"
    b"q\x06(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x10\x00\x00\x00\x00\x00"
    b"\x00\x80?\x00\x00\x00@\x00\x00@@tbU\x10conv1_w_momentumq\x07h\x04u."
)


def test_pickles_of_python_2(tmp_path):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(PYTHON_2)
    read, _ = read_file(str(path))
    assert read["conv1_w"].tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_files_of_detectron_are_matched_by_their_names(tmp_path):
    model = nn.Module()
    model.stem = nn.Module()
    model.stem.conv1 = nn.Conv2d(2, 2, 1, bias=False)
    for i, data in enumerate(({"conv1_w": None}, {"blobs": {"conv1_w": None}, "cfg": "text"})):
        blobs = data.get("blobs", data)
        blobs["conv1_w"] = np.arange(4, dtype=np.float32).reshape(2, 2, 1, 1)
        blobs["conv1_w_momentum"] = np.zeros(1)
        (tmp_path / f"{i}.pkl").write_bytes(pickle.dumps(data, protocol=2))
        nn.init.zeros_(model.stem.conv1.weight)
        assert read_weights(model, str(tmp_path / f"{i}.pkl"), KEY) == []
        assert model.stem.conv1.weight.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_files_of_the_model_zoo(tmp_path):
    state = {k: v.numpy() for k, v in network().state_dict().items()}
    path = tmp_path / "model_final.pkl"
    zoo = {"model": state, "__author__": "Detectron2 Model Zoo"}
    path.write_bytes(pickle.dumps(zoo, protocol=2))
    assert read_weights(network(), str(path), KEY) == []


def test_matching_heuristics_in_an_address(tmp_path):
    """Detectron2 after 0.6 has the address at hand while it reads."""
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "model.pth")
    checkpointer = SafeCheckpointer(model)
    address = urlparse(f"{tmp_path}/model.pth?matching_heuristics=True")
    checkpointer._downloaded, checkpointer._parsed_url_during_load = False, address
    checkpointer._load_model(checkpointer._load_file(str(tmp_path / "model.pth")))
    assert checkpointer.unfilled == [] and model.backbone.weight.eq(1).all()


def test_files_of_pycls(tmp_path):
    torch.save({"model_state": network().state_dict()}, tmp_path / "model.pyth")
    assert read_weights(network(), str(tmp_path / "model.pyth"), KEY) == []


def test_frozen_statistics_that_a_file_lacks_are_named(tmp_path):
    model = nn.Sequential(FrozenBatchNorm2d(2))
    state = dict(model.state_dict())
    del state["0.running_var"]
    torch.save({"model": state}, tmp_path / "model.pth")
    assert read_weights(model, str(tmp_path / "model.pth"), KEY) == ["0.running_var"]


def test_a_web_page(tmp_path):
    path = tmp_path / "model.pth"
    path.write_text("\n<!DOCTYPE html><html>Not found</html>")
    assert "is a web page, not a checkpoint" in refused(path)


def test_an_empty_file_and_none(tmp_path):
    (tmp_path / "model.pth").touch()
    assert "the file is empty" in refused(tmp_path / "model.pth")
    assert "no such file" in refused(tmp_path / "none.pth")


@pytest.mark.parametrize("made, given", [("a?b.pth", "a?b.pth"), ("a.pth", "a.pth?matching=1")])
def test_what_is_not_missing(tmp_path, made, given):
    (tmp_path / made).touch()
    refuse_missing(str(tmp_path / given), "MODEL.WEIGHTS")
    refuse_missing("", "MODEL.WEIGHTS")
    refuse_missing("https://nowhere/x.pth", "MODEL.WEIGHTS")
    with pytest.raises(UserError, match="MODEL.WEIGHTS is '.*c.pth': no such file"):
        refuse_missing(str(tmp_path / "c.pth"), "MODEL.WEIGHTS")


def test_text(tmp_path):
    path = tmp_path / "model.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\n")
    assert "truncated, damaged or not a checkpoint" in refused(path)


def test_torchscript(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "model.pth"))
    assert "is a TorchScript program" in refused(tmp_path / "model.pth")


def test_what_is_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "model.pth")
    assert "holds a list where a state dict is expected" in refused(tmp_path / "model.pth")


def saved(zip_format):
    buffer = io.BytesIO()
    file = {"model": network().state_dict()}
    torch.save(file, buffer, _use_new_zipfile_serialization=zip_format)
    return buffer.getvalue()


def pickled():
    state = {k: v.numpy() for k, v in network().state_dict().items()}
    return pickle.dumps({"model": state, "__author__": "x"}, protocol=2)


@pytest.mark.parametrize("data", [saved(True), saved(False), pickled()])
def test_truncated_files(tmp_path, data):
    path = tmp_path / "model.pkl"
    for i in range(50):
        path.write_bytes(data[: len(data) * i // 50])
        refused(path)


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    data = bytearray(saved(True))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        record = next(x for x in archive.infolist() if x.filename.endswith("data/0"))
    weights = network().conv.weight.detach().numpy().tobytes()
    data[bytes(data).index(weights) + 10] ^= 4
    (tmp_path / "model.pth").write_bytes(data)
    assert f"the checksum of its record {record.filename} is wrong" in refused(
        tmp_path / "model.pth"
    )


@pytest.fixture
def foreign(monkeypatch):
    """An object of a class of another library, by its full name."""

    def make(name):
        module, _, its = name.rpartition(".")
        parents = module.split(".")
        for i in range(len(parents)):
            parent = ".".join(parents[: i + 1])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        kind = type(its, (), {"__module__": module})
        setattr(sys.modules[module], its, kind)
        made = kind()
        made.history = np.arange(3.0)
        return made

    return make


@pytest.mark.parametrize("zip_format", [True, False])
def test_files_straight_from_training(tmp_path, foreign, zip_format):
    """MMEngine keeps objects of its own in what it saves while it trains."""
    path = tmp_path / "epoch_12.pth"
    file = {
        "meta": {"seed": np.int64(3), "best": np.float32(0.5), "epoch": 12},
        "state_dict": {"a.weight": torch.ones(2)},
        "message_hub": {"loss": foreign("mmengine.logging.history_buffer.HistoryBuffer")},
    }
    torch.save(file, path, _use_new_zipfile_serialization=zip_format)
    content, _ = read_file(str(path))
    assert content["meta"]["epoch"] == 12 and torch.equal(
        content["state_dict"]["a.weight"], torch.ones(2)
    )


def test_other_objects_of_theirs_are_refused(tmp_path, foreign):
    torch.save({"state_dict": {}, "x": foreign("mmengine.runner.Loop")}, tmp_path / "x.pth")
    assert refused(tmp_path / "x.pth").endswith(
        "mmengine.runner.Loop; it comes straight from training: publish it with MMDetection's "
        "tools/model_converters/publish_model.py, or save its 'state_dict' and 'meta' alone"
    )


def test_arrays_are_no_weights(tmp_path):
    torch.save({"model": {"a.weight": np.ones(3)}}, tmp_path / "x.pth")
    assert "'a.weight' is no plain tensor" in refused(tmp_path / "x.pth")


def test_compressed_records(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", bytes(10**6))
    assert "is a compressed archive" in refused(tmp_path / "x.pth")


def test_tensors_that_repeat_one_number(tmp_path):
    torch.save({"conv.weight": torch.zeros(1).expand(2**33, 1)}, tmp_path / "x.pth")
    assert "8,589,934,592 numbers, and the file" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x > 0,
        lambda x: x.to(torch.uint8),
        lambda x: x.to(torch.complex64),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: x.tolist(),
    ],
)
def test_weights_that_are_no_real_numbers_are_named(tmp_path, change):
    """Torch would copy truth values and whole numbers into a network without a word."""
    state = network().state_dict()
    torch.save({**state, "conv.weight": change(state["conv.weight"])}, tmp_path / "x.pth")
    assert "its 'conv.weight' is no plain tensor of real numbers" in refused(tmp_path / "x.pth")


def test_half_precision_is_read(tmp_path):
    state = {k: x.half() if x.is_floating_point() else x for k, x in network().state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    assert read_weights(network(), str(tmp_path / "x.pth"), KEY) == []


def test_keys_that_are_no_names(tmp_path):
    torch.save({**network().state_dict(), 1: torch.zeros(1)}, tmp_path / "x.pth")
    assert "its state dict has the key 1, expected names" in refused(tmp_path / "x.pth")


def test_a_pipe_and_a_file_of_safetensors(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unreadable, match="is no file"):
        read_file(str(tmp_path / "pipe"))
    (tmp_path / "x.pth").write_bytes(struct.pack("<Q", 20) + b'{"a": {"dtype": "F32"}}')
    assert "is a file of safetensors" in refused(tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(b"\xef\xbb\xbf\r\n<!DOCTYPE html>")
    assert "is a web page" in refused(tmp_path / "y.pth")

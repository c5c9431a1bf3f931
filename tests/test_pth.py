"""convert/pth.py against real torch.save files, the standard library's zipfile and pickle, and hostile files."""

import io
import json
import os
import pickle
import struct
import sys
import time
import tracemalloc
import types
import warnings
import weakref
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.convert import pth
from jaxllm.errors import ModelError

DATA = Path(__file__).parent / "data"
CHECKPOINTS = sorted(DATA.glob("llama*/*.pth"))
FUZZ = settings(max_examples=200, derandomize=True, deadline=None, database=None)

# torch.save without torch: Python's own pickler, and stand-ins for the few things of torch that a state_dict refers to

TORCH, TORCH_UTILS = types.ModuleType("torch"), types.ModuleType("torch._utils")
for module, names in (TORCH, pth._STORAGES), (TORCH_UTILS, ("_rebuild_tensor_v2", "_rebuild_parameter")):
    for stand_in in names:
        setattr(module, stand_in, type(stand_in, (), {"__module__": module.__name__}))


@dataclass
class Tensor:
    size: object = (2, 3)
    stride: object = (3, 1)
    offset: object = 0
    numel: object = 6
    key: object = "0"
    storage: str = "FloatStorage"
    parameter: bool = False


class Saver(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, tuple) and value and value[0] is TORCH:
            return ("storage", getattr(TORCH, value[1].storage), value[1].key, "cuda:0", value[1].numel)
        return None

    def reducer_override(self, value):
        if isinstance(value, type) and value.__module__.startswith("torch"):
            return value.__name__
        if not isinstance(value, Tensor):
            return NotImplemented
        if value.parameter:
            inner = Tensor(value.size, value.stride, value.offset, value.numel, value.key, value.storage)
            return TORCH_UTILS._rebuild_parameter, (inner, True, OrderedDict())
        arguments = ((TORCH, value), value.offset, value.size, value.stride, False, OrderedDict())
        return TORCH_UTILS._rebuild_tensor_v2, arguments


def pickled(value, protocol=2):
    stream = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": TORCH, "torch._utils": TORCH_UTILS}):
        Saver(stream, protocol).dump(value)
    return stream.getvalue()


VALUES = np.arange(6, dtype=np.float32)


def save(path, value=None, storages=None, *, data_pkl=None, change=None, **zip_options):
    """A file as torch.save writes it; `change` may alter the zip's directory before that is written."""
    with zipfile.ZipFile(path, "w", **zip_options) as archive:
        archive.writestr("x/data.pkl", pickled(value) if data_pkl is None else data_pkl)
        archive.writestr("x/byteorder", b"little")
        for key, content in (storages or {"0": VALUES.tobytes()}).items():
            archive.writestr(f"x/data/{key}", content)
        archive.writestr("x/version", b"3\n")
        if change:
            change(archive)
    return path


def refusal(path):
    """The message of the ModelError that reading raises."""
    with pytest.raises(ModelError) as caught:
        pth.read(path)
    return checked_message(caught.value, path)


def checked_message(error, path):
    message = str(error)
    assert type(error) is ModelError
    assert Path(path).name in message and len(message.splitlines()) == 1 and len(message) < 1000
    assert "allowed" in message or "expected" in message or "download" in message or "right file" in message
    return message


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()


# Files that are right


def meta_layout(folder):
    """Names and shapes of Meta's tensors in one shard, in the order in which the fixtures were saved."""
    params, shards = json.loads((folder / "params.json").read_text()), len(list(folder.glob("*.pth")))
    dim, heads = params["dim"], params["n_heads"]
    kv = dim * params.get("n_kv_heads", heads) // heads
    ffn = {64: 192, 128: 448}[dim]
    yield "tok_embeddings.weight", (512, dim // shards)
    yield "norm.weight", (dim,)
    yield "output.weight", (512 // shards, dim)
    for i in range(params["n_layers"]):
        for name, rows in ("wq", dim), ("wk", kv), ("wv", kv):
            yield f"layers.{i}.attention.{name}.weight", (rows // shards, dim)
        yield f"layers.{i}.attention.wo.weight", (dim, dim // shards)
        yield f"layers.{i}.feed_forward.w1.weight", (ffn // shards, dim)
        yield f"layers.{i}.feed_forward.w2.weight", (dim, ffn // shards)
        yield f"layers.{i}.feed_forward.w3.weight", (ffn // shards, dim)
        yield f"layers.{i}.attention_norm.weight", (dim,)
        yield f"layers.{i}.ffn_norm.weight", (dim,)
    yield "rope.freqs", (dim // heads // 2,)


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.stem[-2:]}")
def test_reads_what_torch_saved(path):
    dtype = np.dtype(np.float16 if "fp16" in path.parent.name else ml_dtypes.bfloat16)
    tensors, layout = pth.read(path), dict(meta_layout(path.parent))
    assert {name: array.shape for name, array in tensors.items()} == layout
    assert list(tensors) == list(layout)
    with zipfile.ZipFile(path) as archive:
        for number, (name, shape) in enumerate(layout.items()):  # torch numbers storages in the order of the dict
            stored = np.frombuffer(archive.read(f"{path.stem}/data/{number}"), dtype).reshape(shape)
            assert tensors[name].dtype == dtype and bits(tensors[name]) == bits(stored), name

    freqs = tensors["rope.freqs"].astype(np.float32)
    np.testing.assert_allclose(freqs, 10000.0 ** -(np.arange(len(freqs)) / len(freqs)), rtol=0.01)
    assert abs(tensors["norm.weight"].astype(np.float32) - 1).max() < 0.5


def test_there_are_three_checkpoints():
    assert len(CHECKPOINTS) == 3


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    path = tmp_path / "model.pth"
    pth.write(path, {"a": VALUES})
    array = pth.read(path)["a"]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    start = path.read_bytes().index(VALUES.tobytes())
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(np.float32(42).tobytes())
    assert array[0] == 42  # a copy would not know


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_kind_of_value(tmp_path, protocol):
    endless = {}
    endless["self"] = [endless, (endless,)]
    state_dict = OrderedDict(
        plain=Tensor(),
        transposed=Tensor(size=(3, 2), stride=(1, 3)),
        column=Tensor(size=(2,), stride=(3,), offset=1),
        parameter=Tensor(parameter=True),
        scalar=Tensor(size=(), stride=(), offset=5),
        empty=Tensor(size=(0, 4), stride=(4, 1), offset=6),
        one=Tensor(size=(1, 1), stride=(2**62, 0), offset=3),
        step=3, big=2**40, negative=-1, note="text", rate=0.5, nothing=None, flag=True, list=[1, [2], Tensor()],
        tuple=(1, 2, 3, 4, (5,)), nested={"tensor": Tensor(), 7: {}}, many=dict.fromkeys(range(3000)), endless=endless,
    )  # fmt: skip
    state_dict._metadata = OrderedDict({"": {"version": 1}, "layer": {"version": 2}})
    tensors = pth.read(save(tmp_path / "a.pth", data_pkl=pickled(state_dict, protocol)))
    expected = {
        "plain": VALUES.reshape(2, 3), "transposed": VALUES.reshape(2, 3).T, "column": VALUES[1::3],
        "parameter": VALUES.reshape(2, 3), "scalar": VALUES[5], "empty": np.zeros((0, 4), np.float32),
        "one": VALUES[3:4].reshape(1, 1),
    }  # fmt: skip
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], array, strict=True)
    assert np.shares_memory(tensors["plain"], tensors["column"])
    assert pth.read(save(tmp_path / "b.pth", data_pkl=pickled(dict(state_dict), protocol))).keys() == expected.keys()


@pytest.mark.parametrize("storage", pth._STORAGES)
def test_every_dtype(tmp_path, storage):
    dtypes = dict(Half="f2", Float="f4", Double="f8", Bool="?", Byte="u1", Char="i1", Short="i2", Int="i4", Long="i8")
    name = storage.removesuffix("Storage")
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "BFloat16" else dtypes[name])
    array = np.array([0, 1, 1, 0, 1], dtype)
    path = save(tmp_path / "a.pth", {"a": Tensor((5,), (1,), 0, 5, storage=storage)}, {"0": array.tobytes()})
    np.testing.assert_array_equal(pth.read(path)["a"], array, strict=True)


SHAPES = [(), (0,), (0, 3), (2, 0, 3), (1,), (1, 1, 1), (7,), (3, 5), (1, 6, 1), (2, 3, 4, 5), (1,) * 8]


@pytest.mark.parametrize("dtype", pth._STORAGES.values(), ids=str)
def test_round_trip(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = {}
    for shape in SHAPES:
        count = int(np.prod(shape))
        limit = 2 if dtype == np.bool_ else 256
        arrays[f"shape {shape}"] = rng.integers(0, limit, count * dtype.itemsize, np.uint8).view(dtype).reshape(shape)
    arrays["transposed"] = arrays["shape (3, 5)"].T
    arrays["every second, backwards"] = arrays["shape (7,)"][::-2]
    path = tmp_path / "model.pth"
    pth.write(path, arrays)
    read = pth.read(path)
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (dtype, array.shape)
        assert bits(read[name]) == bits(array), name  # also of NaNs
        assert read[name].ctypes.data % 64 == 0 and read[name].flags.c_contiguous


def test_what_is_written_by_the_standard_library(tmp_path):
    path = tmp_path / "model.pth"
    arrays = {"a": np.ones((2, 3, 4), ml_dtypes.bfloat16), "": np.float64(2), "b": np.zeros((2, 0), np.int8)}
    pth.write(path, arrays)

    class Loader(pickle.Unpickler):
        def find_class(self, module, name):
            return OrderedDict if name == "OrderedDict" else (lambda *args: (name, *args)) if "_" in name else name

        def persistent_load(self, pid):
            return pid

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # the CRCs are right
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert archive.read("archive/byteorder") == b"little" and archive.read("archive/version") == b"3\n"
        assert archive.read("archive/data/0") == arrays["a"].tobytes()
        loaded = Loader(io.BytesIO(archive.read("archive/data.pkl"))).load()

    def tensor(storage, key, numel, size, stride):
        storage = ("storage", storage, key, "cpu", numel)
        return ("_rebuild_tensor_v2", storage, 0, size, stride, False, OrderedDict())

    assert loaded == {
        "a": tensor("BFloat16Storage", "0", 24, (2, 3, 4), (12, 4, 1)),
        "": tensor("DoubleStorage", "1", 1, (), ()),
        "b": tensor("CharStorage", "2", 0, (2, 0), (1, 1)),
    }


def test_write_takes_a_generator_and_holds_one_array(tmp_path):
    alive = []

    def tensors():
        for i in range(5):
            assert all(reference() is None for reference in alive)
            array = np.full(1000, i, np.float16)
            alive.append(weakref.ref(array))
            yield f"layer {i}", array
            del array

    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    pth.write(first, tensors())
    pth.write(str(second), {f"layer {i}": np.full(1000, i, np.float16) for i in range(5)})
    assert first.read_bytes() == second.read_bytes() and len(pth.read(first)) == 5
    pth.write(first, [])
    assert pth.read(first) == {}


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "model.pth"
    pth.write(path, {"old": VALUES})

    def tensors():
        yield "new", VALUES
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        pth.write(path, tensors())
    assert list(pth.read(path)) == ["old"] and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        pth.write(tmp_path / "no such folder" / "model.pth", {})


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ([("a", VALUES), ("a", VALUES)], "'a', allowed are printable strings, each once"),
        ([("a\nb", VALUES)], r"'a\nb'"),
        ([("\ud800", VALUES)], r"'\ud800'"),
        ([("x" * 1001, VALUES)], "xxx"),
        ([(5, VALUES)], "tensor name 5"),
        ({"a": VALUES.astype(np.complex64)}, "complex64"),
        ({"a": VALUES.astype(">f4")}, ">f4"),
        ({"a": np.array(["text"])}, "<U4"),
        ({"a": np.zeros((1,) * 9, np.int8)}, "9 dimensions"),
    ],
)
def test_write_refuses(tmp_path, tensors, text):
    with pytest.raises(ModelError) as caught:
        pth.write(tmp_path / "model.pth", tensors)
    assert text in checked_message(caught.value, "model.pth") and not list(tmp_path.iterdir())


# Files that want to run something


class Call:
    def __init__(self, function, *arguments):
        self.reduce = function, arguments

    def __reduce__(self):
        return self.reduce


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("place", ["top", "value", "key", "size", "hooks"])
def test_nothing_in_a_pickle_runs(tmp_path, protocol, place):
    ran = tmp_path / "ran"
    call = Call(os.system, f"touch {ran}")
    value = {
        "top": call, "value": {"a": call}, "key": {call: 1},
        "size": {"a": Tensor(size=call)}, "hooks": {"a": (OrderedDict(x=call), Tensor())},
    }[place]  # fmt: skip
    data = pickled(value, protocol)
    message = refusal(save(tmp_path / "a.pth", data_pkl=data))
    assert not ran.exists()
    if protocol > 1:  # older ones have other opcodes on the way there
        assert f"{os.name}.system" in message and "nothing was executed" in message
    if place == "top":
        pickle.loads(data)  # the pickle was a loaded one
        assert ran.exists()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"cos\nsystem\n.", "'os.system'"),
        (b"\x8c\2os\x8c\6system\x93.", "'os.system'"),
        (b"\x8c\2os\x940\x8c\6system\x93.", "POP"),
        (b"(ios\nsystem\n.", "INST"),
        (b"(cos\nsystem\no.", "'os.system'"),
        (b"cbuiltins\neval\n(X\1\0\0\x001tR.", "'builtins.eval'"),
        (b"ccollections\nOrderedDict.__class__\n.", "'collections.OrderedDict.__class__'"),
        (b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
        (b"ccollections\nOrderedDict\n}R.", "a dict in place of a tuple"),
        (b"ccollections\nOrderedDict\n}\x85R.", "takes 0 positional arguments"),
        (b"ctorch\nHalfStorage\n)R.", "not a function"),
        (b"ctorch\nHalfTensor\n.", "'torch.HalfTensor'"),
        (b"ctorch._utils\n_rebuild_parameter\nK\1K\1K\1\x87R.", "a int in place of a _Tensor"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "missing 6"),
        (b"}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(K\1K\0))NNtRs.", "a int in place of a _Storage"),
        (b"\x82\1.", "EXT1"),
        (b"Pid\n.", "PERSID"),
        (b"NQ.", "in place of a tuple"),
        (b")Q.", "missing 5"),
        (b"K\1(X\7\0\0\0storageK\2K\3K\4K\5tQ.", "not a storage"),
        (b"c" + b"a" * 100_000 + b"\nb\n.", "aaa...a"),
        (b"\x80\2ca\nb\\\nc\n.", "data.pkl"),
        (b"I1\n.", "INT"),
        (b"S'text'\n.", "STRING"),
        (b"0.", "POP"),
        (b"]}b.", "a list in place of a dict"),
        (b"\xff.", "unknown"),
    ],
)
def test_opcodes_and_names_outside_of_the_list(tmp_path, data, text):
    with mock.patch("os.system") as system, mock.patch("builtins.eval") as evaluate:
        message = refusal(save(tmp_path / "a.pth", data_pkl=data))
    assert text in message
    assert not system.called and not evaluate.called


# Pickles that are wrong


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (Tensor(key="1"), "'x/data/1', which is missing"),
        (Tensor(key="../version"), "'x/data/../version', which is missing"),
        (Tensor(key=0), "a int in place of a str"),
        (Tensor(numel=5), "5 x float32 in a zip record of 24 bytes"),
        (Tensor(numel=7), "7 x float32"),
        (Tensor(numel=2**60), f"{2**60} x float32"),
        (Tensor(numel=-6), "-6 x float32"),
        (Tensor(numel=6.0), "a float in place of a int"),
        (Tensor(numel=True), "a bool in place of a int"),
        (Tensor(storage="HalfStorage"), "6 x float16 in a zip record of 24 bytes"),
        (Tensor(size=[2, 3]), "a list in place of a tuple"),
        (Tensor(stride=3), "a int in place of a tuple"),
        (Tensor(size=(2, -3)), "(2, -3)"),
        (Tensor(size=(2, 3.0)), "(2, 3.0)"),
        (Tensor(size=(2, True)), "(2, True)"),
        (Tensor(size=(2, None)), "(2, None)"),
        (Tensor(size=(2, "3")), "(2, '3')"),
        (Tensor(size=(2,)), "up to 8 sizes and strides"),
        (Tensor(size=(1,) * 9, stride=(1,) * 9), "up to 8 sizes and strides"),
        (Tensor(stride=(-3, 1)), "stride (-3, 1)"),
        (Tensor(size=(1, 1), stride=(-1, 1)), "stride (-1, 1)"),
        (Tensor(offset=-1), "offset -1"),
        (Tensor(offset=None), "offset None"),
        (Tensor(offset=1), "offset 1"),
        (Tensor(offset=2**70), "outside of its storage of 6 elements"),
        (Tensor(size=(2, 4)), "overlap"),
        (Tensor(size=(3, 3)), "outside of its storage of 6 elements"),
        (Tensor(size=(2**31, 2**31), stride=(2**31, 1)), "outside of its storage of 6 elements"),
        (Tensor(size=(2, 2), stride=(5, 1)), "outside of its storage of 6 elements"),
        (Tensor(size=(0,), stride=(1,), offset=7), "outside of its storage of 6 elements"),
        (Tensor(stride=(0, 1)), "overlap"),
        (Tensor(size=(2, 3), stride=(1, 1)), "overlap"),
        (Tensor(size=(2, 2, 2), stride=(1, 1, 3)), "overlap"),
        (Tensor(size=(2, 3), stride=(1, 2), offset=1), "outside of its storage of 6 elements"),
        (Tensor(size=(2**62, 0), stride=(1, 1)), "too large"),
        (Tensor(size=(2**200, 0), stride=(1, 1)), "allowed"),
        (Tensor(size=(2**40, 2**40, 0), stride=(1, 1, 1)), "too large"),
    ],
    ids=str,
)
def test_wrong_tensors(tmp_path, tensor, text):
    assert text in refusal(save(tmp_path / "a.pth", {"name": tensor}))


def nested_tuples(depth):
    value = ()
    for _ in range(depth):
        value = (value, value)  # of 2**depth leaves when followed
    return value


def nested_tensors(depth):
    tensor = Tensor()
    for _ in range(depth):
        tensor = Tensor(size=(tensor, tensor))
    return tensor


SHARED = pickle.dumps(nested_tuples(200), 2)[2:-1]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "ValueError"),
        (b".", "pop from empty list"),
        (b"}", "exhausted before seeing STOP"),
        (b"}X\xff\xff\xff\xff.", "unicodestring4"),
        (b"}\x8d" + b"\xff" * 8 + b".", "unicodestring8"),
        (b"}X\1\0\0\0\xff.", "UnicodeDecodeError"),
        (b"\x8a\xff.", "long1"),
        (b"\x8b\xff\xff\xff\x7f.", "long4"),
        (b"h\0.", "KeyError(0)"),
        (b"j\xff\xff\xff\xff.", "KeyError(4294967295)"),
        (b"q\0.", "IndexError"),
        (b"t.", "pop from empty list"),
        (b"N\x86.", "pop from empty list"),
        (b"}(K\1u.", "a key without a value"),
        (b"]K\1K\1s.", "a list in place of a dict"),
        (b"}K\1a.", "a dict in place of a list"),
        (b"}NNs.", "a NoneType in place of a str"),
        (b"}" + pickle.dumps(1.5, 2)[2:-1] + b"Ns.", "a float in place of a str"),
        (b"}" + SHARED + b"Ns.", "a tuple in place of a str"),
        (b"}X\xe9\3\0\0" + b"k" * 1001 + b"Ns.", "a key that is too long"),
        (b"}" + pickle.dumps(2**63, 2)[2:-1] + b"Ns.", "a key that is too long"),
        (b"].", "holds a list"),
        (SHARED + b".", "holds a tuple"),
        (b"K\1.", "holds a int"),
        (pickled(Tensor()), "holds a Tensor"),
        (pickled({5: Tensor()}), "tensor name 5"),
        (pickled({"a\nb": Tensor()}), r"'a\nb'"),
        (pickled({"\ud800": Tensor()}), r"'\ud800'"),
        (pickled({"a": Tensor(size=nested_tuples(200))}), "up to 8 sizes and strides"),
        (pickled({"a": Tensor(size=(nested_tuples(200),) * 2)}), "size (((...), (...)), "),
        (pickled({"a": nested_tensors(50)}), "up to 8 sizes and strides"),
        (b"(" * 1_000_000 + b".", "more than the allowed 1000000 opcodes"),
        (b")" + b"\x85" * 1_000_000 + b".", "more than the allowed 1000000 opcodes"),
        (b"X\0\0\x80\0" + b"a" * (8 << 20) + b".", "8388614 bytes, allowed are 8388608"),
    ],
    ids=lambda value: value[:24].decode("latin-1").encode("unicode_escape").decode() if type(value) is bytes else "",
)
def test_wrong_pickles(tmp_path, data, text):
    assert text in refusal(save(tmp_path / "a.pth", data_pkl=data))


def test_hostile_pickles_cost_little(tmp_path):
    # Integers that differ by the hash's modulus hash alike: a dict of n of them takes n² comparisons
    colliding = ((i * sys.hash_info.modulus).to_bytes(10, "little") for i in range(1, 200_000))
    colliding = b"".join(pickle.LONG1 + b"\x0a" + integer + b"N" for integer in colliding)
    name = b"X\xe8\3\0\0" + b"k" * 1000
    equal = b"}" + name + b"Ns" + name + b"q\0Ns" + b"(" + b"h\0N" * 300_000 + b"u."
    copies = b"}q\0(" + b"".join(pickle.dumps(i, 2)[2:-1] + b"N" for i in range(50_000)) + b"u"
    copies += b"(" + b"ccollections\nOrderedDict\nh\0\x85R" * 20_000 + b"t."
    start = time.monotonic()
    assert "too long" in refusal(save(tmp_path / "a.pth", data_pkl=b"}(" + colliding + b"u."))
    assert pth.read(save(tmp_path / "a.pth", data_pkl=equal)) == {}
    assert "arguments" in refusal(save(tmp_path / "a.pth", data_pkl=copies))
    assert time.monotonic() - start < 20  # it is about 1


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(numel=2**60),
        Tensor(size=(2**60,), stride=(1,)),
        Tensor(size=(2**30, 2**30), stride=(0, 0)),
        Tensor(size=(2**62, 0), stride=(0, 0)),
        Tensor(offset=2**60),
    ],
    ids=str,
)
def test_claims_are_checked_before_memory_is_taken(tmp_path, tensor):
    path = save(tmp_path / "a.pth", {"a": tensor})
    refusal(path)
    tracemalloc.start()
    refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# Zip files that are wrong


def test_paths_that_are_no_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.pth")
    assert "not a regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    assert "not a regular file" in refusal(tmp_path / "pipe.pth")
    with pytest.raises(ModelError):
        pth.read("zero\0byte.pth")
    os.symlink(save(tmp_path / "a.pth", {"a": Tensor()}), tmp_path / "link.pth")
    assert list(pth.read(tmp_path / "link.pth")) == list(pth.read(str(tmp_path / "link.pth"))) == ["a"]


def test_a_file_that_cannot_be_opened(tmp_path):
    path = save(tmp_path / "a.pth", {"a": Tensor()})
    with mock.patch("mmap.mmap", side_effect=OSError(12, "Cannot allocate memory")):
        assert "Cannot allocate memory" in refusal(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "legacy format of PyTorch before 1.6"),
        (b"<!DOCTYPE html>\n<html>", "<!DOCTYPE html>"),
        (b"P", "not a zip file"),
        (b"PK\3\4", "truncated"),
        (b"PK\3\4" + bytes(1000), "truncated"),
        (b"PK\5\6" + bytes(18), "not a zip file"),
        (b"PK\3\4" + b"PK\5\6" + bytes(18), "0 records named */data.pkl"),
        (b"PK\3\4" + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, 2**32 - 1, 2**32 - 1, 0), "truncated"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, text):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert text in refusal(path)


def alter(name, **fields):
    def change(archive):
        for field, value in fields.items():
            setattr(archive.getinfo(f"x/{name}"), field, value)

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (alter("data/0", flag_bits=1), "'x/data/0' is compressed or encrypted"),
        (alter("data/0", compress_type=8), "'x/data/0' is compressed or encrypted"),
        (alter("data/0", compress_size=23), "'x/data/0' is compressed or encrypted"),
        (alter("data/0", file_size=2**60, compress_size=2**60), "'x/data/0' ends at byte"),
        (alter("data/0", file_size=1000, compress_size=1000), "'x/data/0' ends at byte"),
        (alter("version", file_size=60, compress_size=60), "'x/version' ends at byte"),  # in the directory
        (alter("data/0", file_size=30, compress_size=30), "'x/data/0' overlaps zip record 'x/version'"),
        (alter("data/0", header_offset=2**60), "outside of the data"),
        (alter("data/0", header_offset=5), "no header, at byte 5"),
        (alter("data/0", header_offset=0), "another name"),
        (alter("data/0", filename="x/data/1"), "another name"),
        (alter("version", filename="x/data/0"), "'x/data/0' has another name"),
        (lambda archive: archive.writestr("x/data/0", b""), "'x/data/0' is there twice"),
        (lambda archive: archive.writestr("y/data.pkl", b"}."), "2 records named */data.pkl"),
        (lambda archive: archive.filelist.pop(0), "0 records named */data.pkl"),
        (lambda archive: archive.filelist.pop(2), "'x/data/0', which is missing"),
        (lambda archive: setattr(archive, "_comment", b"PK\5\6"), "truncated"),
    ],
)
def test_wrong_zip_directories(tmp_path, change, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile, of the duplicate name
        path = save(tmp_path / "a.pth", {"a": Tensor()}, change=change)
    assert text in refusal(path)


def test_a_record_inside_another(tmp_path):
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        archive.writestr("x/data/1", VALUES.tobytes())
    inner = (tmp_path / "inner.zip").read_bytes()[: 30 + 8 + 24]  # a whole record, header and all

    def point_inside(archive):
        archive.getinfo("x/data/1").header_offset = archive.getinfo("x/data/0").header_offset + 30 + 8

    state_dict = {"a": Tensor((62,), (1,), 0, 62, storage="ByteStorage"), "b": Tensor(key="1")}
    storages = {"0": inner, "1": VALUES.tobytes()}
    assert len(pth.read(save(tmp_path / "a.pth", state_dict, storages))) == 2
    message = refusal(save(tmp_path / "a.pth", state_dict, storages, change=point_inside))
    assert "'x/data/0' overlaps zip record 'x/data/1'" in message


def test_local_headers_are_checked_too(tmp_path):
    content = bytearray(save(tmp_path / "a.pth", {"a": Tensor()}).read_bytes())
    header = content.index(b"x/data/0") - 30
    for position, value, text in (header, 0, "no header"), (header + 6, 1, "encrypted"), (header + 8, 8, "compressed"):
        path = tmp_path / "b.pth"
        path.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
        assert text in refusal(path)


def test_compressed_records(tmp_path):
    path = save(tmp_path / "a.pth", {"a": Tensor()}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def test_big_endian(tmp_path):
    path = save(tmp_path / "a.pth", {"a": Tensor()})
    path.write_bytes(path.read_bytes().replace(b"little", b"big!!!"))
    assert "byte order is b'big!!!'" in refusal(path)


def test_a_directory_as_large_as_the_file_is_not_read(tmp_path):
    path = tmp_path / "a.pth"
    with open(path, "wb") as file:
        file.write(b"PK\3\4")
        file.seek(2 << 30)  # no bytes on the disk
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 2 << 30, 0, 0))
    tracemalloc.start()
    assert "a directory of 2147483648 bytes" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_every_shortened_file_is_refused(tmp_path):
    pth.write(tmp_path / "whole.pth", {"a": VALUES, "b": np.ones((2, 2), ml_dtypes.bfloat16)})
    whole = (tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "cut.pth"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refusal(path)
        assert length < 4 or "truncated" in message


# Fuzzing


def outcome(path):
    """The tensors, all bytes of them read, or None for a file that is refused as it should be."""
    try:
        tensors = pth.read(path)
    except ModelError as error:
        checked_message(error, path)
        return None
    size = os.path.getsize(path)
    for array in tensors.values():
        assert array.nbytes <= size and array.ndim <= 8 and not array.flags.writeable
        bits(array)
    return tensors


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzz.pth"


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a file by `write`, and of one by Python's pickler."""
    folder = tmp_path_factory.mktemp("valid")
    pth.write(folder / "a.pth", {"a": VALUES, "b": np.ones((2, 2), ml_dtypes.bfloat16)})
    save(folder / "b.pth", OrderedDict(a=Tensor(), b=Tensor((3, 2), (1, 3), parameter=True)))
    return [(folder / name).read_bytes() for name in ("a.pth", "b.pth")]


BYTES = st.binary(max_size=300) | st.binary(max_size=20).map(lambda tail: b"PK\5\6" + tail)


@FUZZ
@given(st.lists(BYTES | st.sampled_from([b"PK\3\4", b"PK\1\2", b"PK\6\6", b"PK\6\7", b"PK\5\6" + bytes(18)])))
def test_random_bytes(path, pieces):
    path.write_bytes(b"PK\3\4" + b"".join(pieces))
    assert not outcome(path)
    path.write_bytes(b"".join(pieces))
    assert not outcome(path)


def mutated(draw, content):
    """`content` after some flips, cuts and splices."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(["flip", "flip", "number", "cut", "insert", "copy", "end"])):
            case "flip":
                content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "number":
                extreme = draw(st.sampled_from([0, 1, 2**7, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
                width = draw(st.sampled_from([2, 4, 8]))
                content[at : at + width] = extreme.to_bytes(8, "little")[:width]
            case "cut":
                del content[at : at + draw(st.integers(1, 64))]
            case "insert":
                content[at:at] = draw(st.binary(max_size=8))
            case "copy":
                source = draw(st.integers(0, len(content)))
                content[at:at] = content[source : source + draw(st.integers(1, 128))]
            case "end":
                del content[at:]
    return bytes(content)


@settings(FUZZ, max_examples=500)
@given(st.data())
def test_mutated_files(path, valid, data):
    path.write_bytes(mutated(data.draw, data.draw(st.sampled_from(valid))))
    outcome(path)


@settings(FUZZ, max_examples=500)
@given(st.data())
def test_mutated_directories(path, valid, data):
    content = data.draw(st.sampled_from(valid))
    start = content.index(b"PK\1\2")
    path.write_bytes(content[:start] + mutated(data.draw, content[start:]))
    outcome(path)


PICKLES = [pickled(OrderedDict(a=Tensor(), b=Tensor((3, 2), (1, 3), parameter=True)), p) for p in (2, 3, 4, 5)]


@settings(FUZZ, max_examples=500)
@given(st.data())
def test_mutated_pickles(path, data):
    outcome(save(path, data_pkl=mutated(data.draw, data.draw(st.sampled_from(PICKLES)))))


SMALL = [opcode + bytes([n]) for opcode in (pickle.BINGET, pickle.BINPUT, pickle.BININT1) for n in range(5)]
GLOBALS = [
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nFloatStorage\n",
    b"cos\nsystem\n",
]
STRINGS = [pickle.dumps(text, 2)[2:-1] for text in ("storage", "0", "cpu", "name")]
STORAGE = b"(" + STRINGS[0] + GLOBALS[3] + STRINGS[1] + STRINGS[2] + b"K\6tQ"
ARGUMENTS = b"(" + STORAGE + b"K\0K\2K\3\x86K\3K\1\x86\x89NtR"
PIECES = [bytes([code]) for code in b"()]}.abesu0NQRtll\x81\x85\x86\x87\x88\x89\x93\x94\x95"]
PIECES += [*SMALL, *GLOBALS, *STRINGS, STORAGE, GLOBALS[1] + ARGUMENTS, STRINGS[3] + GLOBALS[1] + ARGUMENTS + b"s"]


@settings(FUZZ, max_examples=500)
@given(st.lists(st.sampled_from(PIECES) | st.binary(min_size=1, max_size=2), max_size=40))
def test_random_opcodes(path, pieces):
    outcome(save(path, data_pkl=b"\x80\2}" + b"".join(pieces) + b"."))


KEYS = st.text(max_size=5) | st.integers(-(2**63) + 1, 2**63 - 1)
LEAVES = st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats() | st.text(max_size=300)
VALUES_BESIDE = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)
NAMES = st.text(st.characters(categories=["L", "N", "P"]), max_size=10)


@settings(FUZZ, max_examples=100)
@given(st.dictionaries(NAMES, st.just(Tensor()) | VALUES_BESIDE, max_size=8), st.integers(2, 5))
def test_values_beside_tensors_are_ignored(path, state_dict, protocol):
    tensors = pth.read(save(path, data_pkl=pickled(state_dict, protocol)))
    assert list(tensors) == [name for name, value in state_dict.items() if isinstance(value, Tensor)]
    assert all(np.array_equal(array, VALUES.reshape(2, 3)) for array in tensors.values())


@settings(FUZZ, max_examples=500)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4), st.integers(0, 6))
def test_strides_against_enumeration(path, layout, offset):
    storage = np.arange(24, dtype=np.float32)
    size, stride = tuple(n for n, _ in layout), tuple(s for _, s in layout)
    indices = list(product(*map(range, size)))
    elements = [offset + sum(i * s for i, s in zip(index, stride, strict=True)) for index in indices]
    save(path, {"a": Tensor(size, stride, offset, 24)}, {"0": storage.tobytes()})
    tensors = outcome(path)
    if tensors:
        assert len(set(elements)) == len(elements)
        np.testing.assert_array_equal(tensors["a"], storage[elements].reshape(size), strict=True)
        return
    message = refusal(path)
    if "outside of its storage of 24" in message:
        assert max(elements) > 23
    else:  # more is refused than need be: two combs of which one fills the gaps of the other, which no slicing makes
        assert "overlap" in message and (len(set(elements)) < len(elements) or len(size) > 1)


@FUZZ
@given(st.data())
def test_views_of_views(path, data):
    base = np.arange(120, dtype=np.float32)
    view = base.reshape(data.draw(st.sampled_from([(120,), (10, 12), (2, 3, 4, 5), (6, 1, 20)])))
    view = view.transpose(data.draw(st.permutations(range(view.ndim))))
    view = view[tuple(slice(data.draw(st.integers(0, n)), None, data.draw(st.integers(1, 3))) for n in view.shape)]
    offset = (view.ctypes.data - base.ctypes.data) // 4 if view.size else 0
    tensor = Tensor(view.shape, tuple(step // 4 for step in view.strides), offset, 120)
    read = pth.read(save(path, {"a": tensor}, {"0": base.tobytes()}))["a"]
    np.testing.assert_array_equal(read, view, strict=True)

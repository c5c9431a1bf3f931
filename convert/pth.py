"""PyTorch checkpoints (`.pth`, `.bin`) without PyTorch: read as views of the mapped file, and written.

torch.save (PyTorch 1.6 and newer, torch/serialization.py) makes a zip of uncompressed records. `NAME/data.pkl` is a
pickle of the state_dict in which every tensor is a call of `_rebuild_tensor_v2` on a storage; `NAME/data/KEY` holds the
bytes of storage KEY. A pickle is a program that may call anything: here the few opcodes that a state_dict needs are
interpreted, and the names in `_GLOBALS` are the only ones that it can reach.
"""

import io
import itertools
import math
import mmap
import os
import pickle  # for the names of the opcodes: nothing in this file unpickles
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxllm.errors import ModelError

_STORAGES = {
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
}

# The most that a hostile file may make us build. Llama 3.1 405B needs 0.2 MB and 25 000 opcodes for its 1138 tensors.
_MAX_BYTES = 8 << 20  # of data.pkl, and of the zip's directory
_MAX_OPCODES = 1_000_000
_MAX_NDIM = 8
_MAX_KEY = 1000  # characters

_DAMAGED = "the file is damaged or was cut short, download or copy it again"
_RESAVE = "save it again with torch.save(model.state_dict(), FILE) in PyTorch 1.6 or newer"

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxtuple, _SHORT.maxstring, _SHORT.maxother = 2, _MAX_NDIM, 120, 120


@dataclass(frozen=True, eq=False, repr=False)
class _Storage:
    dtype: np.dtype
    key: str
    numel: int


@dataclass(frozen=True, eq=False, repr=False)
class _Tensor:
    """What the pickle says of a tensor, not yet checked; offset, size and stride count elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors, by name, of a state_dict that torch.save wrote (zip format, PyTorch 1.6 or newer).

    Each is a read-only view of one memory map, read from disk where it is used: do not change the file while a view
    lives. Values that are no tensors are left out. Nothing in the file is executed. Raises ModelError and nothing else.
    """
    try:
        data, records = _open(path)
        return _tensors(data, records)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}), expected is a readable file; check its permissions"
        ) from error


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a state_dict as torch.save does, for `read` and torch.load(path, weights_only=True).

    `tensors` may be a generator of (name, array): an array is let go once it is written, and neither it nor the file
    has a limit of 4 GiB. Data starts at multiples of 64 bytes. The file gets its name when it is complete. Raises
    ModelError for a name or a dtype that `read` would not take, OSError when the disk fails.
    """
    storages = {dtype: name for name, dtype in _STORAGES.items()}
    entries = {}  # tensor name -> its part of data.pkl, the last record: a zip is read from its directory, in any order
    partial = f"{os.fspath(path)}.part"
    try:
        with open(partial, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
                array = np.asarray(tensor, order="C")
                if not _is_name(name) or name in entries:
                    raise ModelError(f"{path}: tensor name {_show(name)}, allowed are printable strings, each once")
                if array.dtype not in storages or array.ndim > _MAX_NDIM:
                    raise ModelError(
                        f"{path}: tensor {_show(name)} is {array.dtype} in {array.ndim} dimensions, allowed are "
                        f"{', '.join(map(str, storages))} in up to {_MAX_NDIM}; convert it first"
                    )
                key = str(len(entries))
                entries[name] = _pickled_tensor(storages[array.dtype], key, array.shape)
                _add_record(file, archive, f"data/{key}", array.reshape(-1).view(np.uint8))
                del tensor, array  # else they live on while a generator makes the next one
            items = b"".join(_pickled(name) + entry for name, entry in entries.items())
            top = pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP
            for name, content in {"data.pkl": top, "byteorder": b"little", "version": b"3\n"}.items():
                _add_record(file, archive, name, content)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


# Reading the zip


class _BoundedFile(io.FileIO):
    """zipfile reads a directory of whatever size the file claims into memory; this refuses."""

    def read(self, size=-1):
        if size is not None and size > _MAX_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes, allowed are {_MAX_BYTES}")
        return super().read(size)


def _open(path):
    """The file's memory map, and for every record of its zip the (start, size) of the data in bytes, by record name."""
    if not os.path.isfile(path):  # also because opening a pipe would wait for its writer
        found = "this is not a regular file" if os.path.exists(path) else "there is no such file"
        raise ModelError(f"{found}, expected is a checkpoint that torch.save wrote; check the path")
    with _BoundedFile(path) as file:
        head = file.read(64)
        if not head:
            raise ModelError("the file is empty, expected is a zip file from torch.save; download or copy it again")
        if head.startswith(b"version https://git-lfs"):
            raise ModelError("a Git LFS pointer, expected is the checkpoint itself; run `git lfs pull` in its folder")
        if head.startswith(pickle.PROTO):
            raise ModelError(f"looks like the legacy format of PyTorch before 1.6, allowed is the zip one; {_RESAVE}")
        if not head.startswith(b"PK\3\4"):
            raise ModelError(f"not a zip file from torch.save, it starts with {head[:16]!r}; is it the right file?")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return data, _records(file, data)


def _records(file, data):
    # CRCs are not verified: that would read every byte of a file of many GB
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # zipfile was not made for hostile bytes; what it raises differs from version to version
        raise ModelError(f"truncated? No zip directory can be read at its end, {_show(error)}; {_DAMAGED}") from error
    header = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, lengths of the name and of the extra field
    records, spans = {}, []
    for info in archive.infolist():
        name, offset, size = info.orig_filename, info.header_offset, info.file_size
        record = f"zip record {_show(name)}"
        if not 0 <= offset <= archive.start_dir - header.size:
            raise ModelError(f"{record} starts at byte {offset}, outside of the data; {_DAMAGED}")
        signature, flags, method, name_length, extra_length = header.unpack_from(data, offset)
        local_name = data[offset + header.size : offset + header.size + name_length]
        start = offset + header.size + name_length + extra_length
        if signature != b"PK\3\4" or local_name != name.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
            raise ModelError(f"{record} has another name, or no header, at byte {offset}; {_DAMAGED}")
        if (info.flag_bits | flags) & 1 or info.compress_type or method or info.compress_size != size:
            raise ModelError(f"{record} is compressed or encrypted, allowed are plain records; {_RESAVE}")
        if start + size > archive.start_dir:
            raise ModelError(f"{record} ends at byte {start + size}, outside of the data; {_DAMAGED}")
        if name in records:
            raise ModelError(f"{record} is there twice, allowed is once; {_DAMAGED}")
        records[name] = start, size
        spans.append((offset, start + size, record))
    for (_, end, record), (offset, _, other) in itertools.pairwise(sorted(spans)):
        if offset < end:
            raise ModelError(f"{record} overlaps {other}; {_DAMAGED}")
    return records


# From records to arrays


def _tensors(data, records):
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ModelError(
            f"a zip file with {len(pickles)} records named */data.pkl, expected is the one of torch.save; {_RESAVE}"
        )
    prefix = pickles[0].removesuffix("data.pkl")

    start, size = records.get(prefix + "byteorder", (0, 0))  # PyTorch before 2.1 did not write it
    byteorder = data[start : start + min(size, 16)]
    if byteorder not in (b"", b"little"):
        raise ModelError(f"its byte order is {byteorder!r}, allowed is b'little'; {_RESAVE} on a little-endian machine")

    start, size = records[pickles[0]]
    if size > _MAX_BYTES:
        raise ModelError(f"data.pkl has {size} bytes, allowed are {_MAX_BYTES}; {_RESAVE}")
    try:
        top = _interpret(data[start : start + size])
    except ModelError:
        raise
    except Exception as error:  # bytes that are no pickle fail in many ways, in pickletools and on the stack
        raise ModelError(f"data.pkl is not a pickle that torch.save writes, {_show(error)}; {_DAMAGED}") from error
    if type(top) is not dict:
        raise ModelError(f"data.pkl holds a {type(top).__name__.lstrip('_')}, allowed is a dict of tensors; {_RESAVE}")
    return {name: _view(name, tensor, data, records, prefix) for name, tensor in top.items() if type(tensor) is _Tensor}


def _view(name, tensor, data, records, prefix):
    """The tensor as an array over the map, once all that the pickle says of it is known to lie inside its record."""
    if not _is_name(name):
        raise ModelError(f"tensor name {_show(name)}, allowed are printable strings; {_RESAVE}")
    storage, offset, size, stride = tensor.storage, tensor.offset, tensor.size, tensor.stride
    record, dtype = f"{prefix}data/{storage.key}", storage.dtype
    label = f"tensor {_show(name)}"
    if record not in records:
        raise ModelError(f"{label} lies in the zip record {_show(record)}, which is missing; {_DAMAGED}")
    start, num_bytes = records[record]
    if storage.numel * dtype.itemsize != num_bytes:
        raise ModelError(f"{label}: {_show(storage.numel)} x {dtype} in a zip record of {num_bytes} bytes; {_DAMAGED}")

    label += f" with offset {_show(offset)}, size {_show(size)}, stride {_show(stride)}"
    if not len(size) == len(stride) <= _MAX_NDIM or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ModelError(f"{label}: allowed are up to {_MAX_NDIM} sizes and strides, integers of 0 or more; {_RESAVE}")
    last = 0  # from the first element to the last one, over the dimensions so far, from the smallest stride up
    for step, count in sorted(zip(stride, size, strict=True)):
        if count > 1 and step <= last and 0 not in size:
            raise ModelError(
                f"{label}: elements overlap, allowed are distinct ones; call .contiguous() on it and {_RESAVE}"
            )
        last += step * (count - 1)
    if offset + (0 if 0 in size else last + 1) > storage.numel:
        raise ModelError(f"{label} is outside of its storage of {storage.numel} elements; {_DAMAGED}")
    # A stride that is never taken may be any number, also one that is too large for NumPy
    taken = [step if count > 1 and 0 not in size else 0 for step, count in zip(stride, size, strict=True)]
    try:
        return np.ndarray(size, dtype, data, start + offset * dtype.itemsize, [dtype.itemsize * step for step in taken])
    except (ValueError, OverflowError) as error:  # sizes such as (0, 2**62)
        raise ModelError(f"{label} is too large for NumPy, allowed are less than 2**63 bytes; {_RESAVE}") from error


# Reading the pickle


def _rebuild_tensor(storage, offset, size, stride, requires_grad, backward_hooks, metadata=None):
    return _Tensor(_expect(_Storage, storage), offset, _expect(tuple, size), _expect(tuple, stride))


def _rebuild_parameter(tensor, requires_grad, backward_hooks):
    return _expect(_Tensor, tensor)


_GLOBALS = {
    "collections.OrderedDict": lambda: {},  # no arguments: to copy one dict again and again is quadratic
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
}


def _interpret(data):
    """The value of a pickle of protocol 2 to 5: dicts, lists, tuples, strings, numbers, None and `_Tensor`s.

    Containers are never hashed, compared or printed: they may hold themselves, or be exponentially large when followed.
    """
    stack, memo = [], {}
    outer = []  # MARK puts the stack away here, the opcode that ends the group brings it back

    def pop(count):
        return tuple([stack.pop() for _ in range(count)][::-1])

    def pop_group():
        nonlocal stack
        group, stack = stack, outer.pop()
        return group

    for opcode, arg, _ in itertools.islice(pickletools.genops(data), _MAX_OPCODES):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "MARK":
                outer.append(stack)
                stack = []
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(pop(("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3").index(opcode.name)))
            case "TUPLE":
                group = pop_group()
                stack.append(tuple(group))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                group = pop(1) if opcode.name == "APPEND" else pop_group()
                _expect(list, stack[-1]).extend(group)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                group = pop(2) if opcode.name == "SETITEM" else pop_group()
                _set_items(_expect(dict, stack[-1]), group)
            case "BUILD":  # attributes of an OrderedDict, such as a module's `_metadata`
                stack.pop()
                _expect(dict, stack[-1])
            case "GLOBAL":
                stack.append(_global(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_global(*pop(2)))
            case "BINPERSID":
                stack.append(_storage(*_expect(tuple, stack.pop())))
            case "REDUCE":
                function, arguments = pop(2)
                if not callable(function):  # what can be called came out of _GLOBALS
                    raise TypeError("a call of what is not a function")
                stack.append(function(*_expect(tuple, arguments)))
            case "STOP":
                return stack.pop()
            case _:
                raise ModelError(f"data.pkl has the opcode {opcode.name}, allowed are those of a state_dict; {_RESAVE}")
    raise ModelError(f"data.pkl has more than the allowed {_MAX_OPCODES} opcodes; {_RESAVE}")


def _expect(kind, value):
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _set_items(target, group):
    if len(group) % 2:
        raise TypeError("a key without a value")
    for key, value in zip(group[::2], group[1::2], strict=True):
        # A dict compares keys that hash alike: short ones are compared fast, and few 64-bit integers hash alike
        if key.bit_length() > 63 if type(key) is int else len(_expect(str, key)) > _MAX_KEY:
            raise TypeError("a key that is too long")
        target[key] = value


def _global(module, name):
    name = f"{_expect(str, module)}.{_expect(str, name)}"
    if name not in _GLOBALS:
        raise ModelError(
            f"data.pkl asks for {_show(name)}, allowed are the few names that a dict of tensors needs; nothing was "
            f"executed; if you trust the file's author, {_RESAVE}"
        )
    return _GLOBALS[name]


def _storage(kind, dtype, key, location, numel):
    if _expect(str, kind) != "storage" or not isinstance(dtype, np.dtype):
        raise TypeError("a persistent id that is not a storage's")
    return _Storage(dtype, _expect(str, key), _expect(int, numel))


# Writing


def _pickled_tensor(storage, key, shape):
    """The opcodes that make a contiguous tensor of that shape from all of a storage."""
    stride = tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))
    persistent_id = _pickled("storage") + _pickled_global("torch", storage) + _pickled(key) + _pickled("cpu")
    persistent_id = pickle.MARK + persistent_id + _pickled(math.prod(shape)) + pickle.TUPLE + pickle.BINPERSID
    hooks = _pickled_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = persistent_id + _pickled(0) + _pickled(shape) + _pickled(stride) + pickle.NEWFALSE + hooks
    function = _pickled_global("torch._utils", "_rebuild_tensor_v2")
    return function + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE


def _pickled_global(module, name):
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _pickled(value):
    if isinstance(value, tuple):
        return pickle.MARK + b"".join(map(_pickled, value)) + pickle.TUPLE
    if isinstance(value, str):
        return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
    return pickle.LONG1 + struct.pack("<Bq", 8, value)


def _add_record(file, archive, name, content):
    info = zipfile.ZipInfo(f"archive/{name}")  # with its default date, so that equal tensors make equal files
    # Before the data: a header of 30 bytes, the name, our extra field (torch's tag), zipfile's of 20 with 64-bit sizes
    padding = -(file.tell() + 30 + len(info.filename) + 4 + 20) % 64
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as record:
        record.write(content)


def _is_name(name):
    return type(name) is str and name.isprintable() and len(name) <= _MAX_KEY


def _show(value):
    """repr, on one line and cut short: a value from the file may be endless."""
    return _SHORT.repr(value)

"""Model folders: config.json, *.safetensors and the tokenizer's own file; memory-mapped to read, written as a stream.

safetensors: https://github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""

import ctypes
import json
import math
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from pathlib import Path
from typing import BinaryIO

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxllm import resources
from jaxllm.config import ModelConfig
from jaxllm.errors import InputError, ModelError
from jaxllm.kernels.reference import GROUP
from jaxllm.model import MATRICES, Params, abstract_params, matrix_scheme
from jaxllm.ops import check_implementations
from jaxllm.pipeline import LEAST, enable_compilation_cache
from jaxllm.quantize import NOT_FINITE, SCHEMES, column_fill, column_gain, divide_up, equalizes
from jaxllm.quantize import quantize as quantize_weight
from jaxllm.tensor import Array, QTensor
from jaxllm.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
ALIGNMENT = 64  # bytes: where a tensor starts so, a CPU device can use the map itself
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # a folder has one of them; of two the first, which may have more
NORMS = ("attn_norm", "ffn_norm", "norm")
DEMO = Path(__file__).parent / "demo"
# an upload is staged in pinned memory, which takes time to get and is not given back; smaller pieces cost more calls
PIECE_BYTES = 16 << 20
THREADS = 8
WRITERS = 4  # threads that convert weights and write them
MANY = 1 << 16  # numbers that are worth a compiled program, where numpy is slow

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}


@dataclass(frozen=True)
class MappedFile:
    """A file of which there is a memory map, and its size and time of change when that was made."""

    path: Path
    opened: BinaryIO  # asked about the file that is mapped: another one may have its name by now
    size: int
    changed_ns: int

    def check(self) -> None:
        """Raise ModelError if the file was cut short or written to, so that the map holds something else by now."""
        now = os.fstat(self.opened.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.size, self.changed_ns):
            raise ModelError(
                f"{self.path} was changed while it was in use ({self.size} bytes before, {now.st_size} now); put it "
                f"back, and load the model again"
            )


@dataclass(frozen=True)
class Folder:
    """A model folder whose headers were read and checked, and of whose weights nothing was read yet.

    config is as stored, quantize and keep_float say how the matrices are (as in `abstract_params`), tensors are views
    of memory maps by name.
    """

    path: Path
    config: ModelConfig
    quantize: str | None
    keep_float: tuple[str, ...]
    tokenizer: Tokenizer
    tensors: dict[str, np.ndarray]
    files: tuple[MappedFile, ...]


@dataclass(frozen=True)
class Model:
    """A loaded model: what `forward` and `generate` need.

    files are those that the params may be maps of; path is the folder, where a chat template is looked for.
    """

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer
    files: tuple[MappedFile, ...] = ()
    path: Path | None = None

    def close(self) -> None:
        """Give the weights' memory back now, whoever else holds them: they cannot be used any more."""
        for leaf in jax.tree.leaves(self.params):
            leaf.delete()

    def check(self) -> None:
        """Raise InputError if the model was closed, and ModelError if a file under its weights was changed."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.params.embed)):
            raise InputError("the model was closed; load it again")
        for file in self.files:
            file.check()


@dataclass(frozen=True)
class Weight:
    """A tensor that is read when it is written: blocks() yields rows, [n, in] at a time (of a norm [D], all).

    They are float arrays, or QTensors where the source is quantized and its int8 values are to be kept.
    """

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray | QTensor]]


def open_folder(path=None, tokenizer=None) -> Folder:
    """Open a model folder (by default the small model inside the package), reading headers and tokenizer only.

    tokenizer is a file to use instead of the folder's own.
    Raises ModelError naming the file when the folder is not a model, or sizes or types differ from its config.json's.
    """
    path = DEMO if path is None else Path(path)
    config, quantize, keep_float = read_config(path)
    tokenizer_file = Path(tokenizer) if tokenizer else find_tokenizer(path)
    reader = load_tokenizer(tokenizer_file)
    check_vocabulary(reader, tokenizer_file, config)
    tensors, files = _read_tensors(path, config, quantize, keep_float)
    return Folder(path, config, quantize, keep_float, reader, tensors, files)


def load(
    path=None,
    quantize: str | None = None,
    dtype: str | None = None,
    tokenizer=None,
    kv_cache: str | None = None,
    keep_float: Collection[str] = (),
    batch: int = 1,
    max_len: int | None = None,
    impl: str = "auto",
) -> Model:
    """Load a model folder (by default the small model inside the package) onto JAX's default device.

    quantize, one of `quantize.SCHEMES`, quantizes the matrices of a float model while it is read, but for those named
    in keep_float (of `model.MATRICES`).  dtype, "float32" or "bfloat16", is the type of activations and cache: float32
    by default on CPUs and for float32 models, else bfloat16.  Float weights that are wider are narrowed to it; narrower
    ones stay as they are stored, because widening adds bytes and no information.  kv_cache="int8" halves the cache.
    tokenizer is a file to use instead of the folder's own; path may be what `open_folder` returned, and then has it.
    impl names the implementations of the ops that run the model, as in `ops.check_implementations`.

    On a CPU the arrays are the memory map itself, which other processes share; elsewhere pieces of the map are uploaded
    by several threads.  Turns on the persistent compilation cache unless the user has one.
    Raises ModelError naming the file when the folder is not a model, or is damaged, or changes meanwhile; InputError
    for settings that do not go together, and, before anything is allocated, when the device's free memory does not
    suffice for the weights and `batch` prompts of max_len tokens each (by default as few as a run takes).
    """
    enable_compilation_cache()
    check_implementations(impl)
    folder = path if isinstance(path, Folder) else open_folder(path, tokenizer)
    if max_len is None:
        max_len = min(LEAST, folder.config.max_len)
    device = jax.extend.backend.get_default_device()
    plan = plan_folder(folder, batch, max_len, quantize, kv_cache, dtype, keep_float)
    resources.require_memory(plan, resources.free_memory(device))
    _check_scales(folder)
    params = _place(folder, plan, device)
    for file in folder.files:
        file.check()
    # behind an upload the files do not matter any more
    config = replace(plan.config, impl=impl)
    return Model(params, config, folder.tokenizer, folder.files if device.platform == "cpu" else (), folder.path)


def plan_folder(
    folder: Folder, batch=1, max_len=None, quantize=None, kv_cache=None, dtype=None, keep_float=()
) -> resources.Plan:
    """The memory plan of a folder that is loaded with these arguments of `load`; max_len None is the whole context.

    Raises InputError for settings out of range, and for a quantization that an int8 model cannot be given any more.
    """
    if dtype is None:
        dtype = "float32" if folder.config.dtype == "float32" or jax.default_backend() == "cpu" else "bfloat16"
    asked = resources.plan(
        folder.config,
        batch,
        max_len,
        quantize or folder.quantize,
        kv_cache,
        dtype=dtype,
        keep_float=tuple(keep_float) or folder.keep_float,
    )
    as_stored = (asked.quantize, {*asked.keep_float}) == (folder.quantize, {*folder.keep_float})
    if folder.quantize and not as_stored:
        raise InputError(
            f"{folder.path} is {_scheme_text(folder.quantize, folder.keep_float)} and cannot be made "
            f"{_scheme_text(asked.quantize, asked.keep_float)} while it is loaded; convert the checkpoint again"
        )
    return asked


def _scheme_text(quantize, keep_float):
    return quantize + (f" with {', '.join(keep_float)} as float" if keep_float else "")


def _check_scales(folder):
    for name, scale in folder.tensors.items():
        if name.endswith(".scale"):
            name = name.removesuffix(".scale")
            check_scale(folder.path, name, folder.tensors[f"{name}.values"], scale)


def check_scale(path: Path, name: str, values: np.ndarray, scale: np.ndarray) -> None:
    """Raise ModelError for scales that no quantization writes: they are few, and a wrong one spoils a whole row.

    values int8 [*out, in] are rows of the weight of this name, and scale [*out] or [*out, groups] theirs.
    """
    right = np.isfinite(scale) & (scale >= 0)
    if not right.all():
        raise ModelError(
            f"{path}: {name}.scale holds the scale {scale[~right][0]}, and a scale is finite and not negative; "
            f"convert the checkpoint again"
        )
    for at in map(tuple, np.argwhere(scale == 0)):
        if scale.ndim == values.ndim:
            at = *at[:-1], slice(at[-1] * GROUP, (at[-1] + 1) * GROUP)
        if values[at].any():
            raise ModelError(f"{path}: {name}.scale is 0 where the values are not; convert the checkpoint again")


def _place(folder, plan, device):
    """The Params on a device, with the matrices of a float folder narrowed or quantized as the plan says."""
    stored, tree = jax.tree_util.tree_flatten_with_path(
        abstract_params(folder.config, folder.quantize, folder.keep_float)
    )
    names = [_name(keys) for keys, _ in stored]
    gains = _gains(folder, plan, device)
    changes = {name: _change(name, folder, plan, gains) for name in names}
    # on a CPU, what stays as it is stays where it is
    moved = [name for name in names if device.platform != "cpu" or changes[name] is not None]
    placed = dict(zip(moved, _upload([(folder.tensors[n], changes[n]) for n in moved], device), strict=True))
    leaves = [placed[n] if n in placed else jax.device_put(folder.tensors[n], device) for n in names]
    for layer, gain in gains.items():
        at = names.index(f"{layer}.w_gate_up")
        leaves[at] = divide_up(leaves[at], gain)
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, QTensor) and not jnp.isfinite(leaf.scale).all():
            raise ModelError(f"{folder.path}: {name} {NOT_FINITE}")
    return jax.tree.unflatten(tree, leaves)


def _gains(folder, plan, device) -> dict:
    """Of every layer, by name, what the columns of its w_down are multiplied by before they are quantized."""
    if folder.quantize or not equalizes(plan.quantize, plan.keep_float):
        return {}

    def fill(rows):
        return jax.block_until_ready(_column_fill(jax.device_put(rows, device)))

    def gain(layer):
        return column_gain(reduce(jnp.maximum, map(fill, _pieces(folder.tensors[f"{layer}.w_down"]))))

    layers = [f"layers.{i}" for i in range(folder.config.n_layers)]
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(layers, pool.map(gain, layers), strict=True))


def _change(name, folder, plan, gains):
    """What has to be done with a stored tensor: a jitted function of its rows, or None."""
    layer, _, part = name.rpartition(".")
    if part in ("values", "scale"):
        return None
    scheme = matrix_scheme(part, plan.quantize, plan.keep_float)
    if scheme:
        return partial(_quantize, scheme=scheme, gain=gains.get(layer) if part == "w_down" else None)
    return partial(_cast_on_device, dtype=plan.weight_dtype) if folder.config.dtype != plan.weight_dtype else None


_column_fill = jax.jit(column_fill)


@partial(jax.jit, static_argnames="scheme")
def _quantize(rows, scheme, gain=None):
    """Rows [n, in], times gain [in] where there is one, as int8."""
    return quantize_weight(rows if gain is None else rows.astype(jnp.float32) * gain, scheme)


_cast_on_device = jax.jit(lambda array, dtype: array.astype(dtype), static_argnames="dtype")


@partial(jax.jit, static_argnames="shape")
def _join(pieces, shape):
    """Pieces of rows [n, in] as one tensor [*out, in] of this shape; of QTensors the values and the scales."""
    return jax.tree.map(lambda *rows: jnp.concatenate(rows).reshape(*shape[:-1], *rows[0].shape[1:]), *pieces)


def _upload(tensors, device) -> list[Array]:
    """The (array, change) pairs on a device: sent by several threads in pieces of rows, a change applied to each piece.

    The host never holds more of a model than the pieces under way.
    """
    pieces = [_pieces(array) for array, _ in tensors]
    small = [i for i, (array, change) in enumerate(tensors) if array.nbytes <= PIECE_BYTES // 16 and change is None]
    # while pieces are joined a tensor takes its memory twice: the largest ones come first, when there is room
    order = sorted({*range(len(tensors))} - {*small}, key=lambda i: -tensors[i][0].nbytes)

    def send(i, program):
        parts = []
        for rows in pieces[i]:
            part, change = jax.device_put(rows, device), tensors[i][1]
            parts.append(jax.block_until_ready(part if change is None else change(part)))
            advise(rows, "MADV_DONTNEED")  # the pages stay in the page cache, and are not counted as ours
        return parts[0] if program is None else program.result()(parts)

    placed = {}
    with ThreadPoolExecutor(1) as compiler, ThreadPoolExecutor(THREADS) as pool:
        sent = {i: pool.submit(send, i, program) for i, program in _programs(tensors, pieces, order, device, compiler)}
        placed |= zip(small, jax.device_put([tensors[i][0] for i in small], device), strict=True)  # in one call
        for at, i in enumerate(order):
            for ahead in order[at + THREADS : at + THREADS + 1]:
                advise(tensors[ahead][0], "MADV_WILLNEED")  # reads it from the disk, if it is not in memory
            placed[i] = sent[i].result()
    return [placed[i] for i in range(len(tensors))]


def _programs(tensors, pieces, order, device, compiler):
    """For each tensor of order its number and the Future of what joins its pieces, None where there is one piece.

    They are compiled, or read from the cache, beside the upload, and each once for all tensors of a kind.
    """
    programs, sharding = {}, jax.sharding.SingleDeviceSharding(device)
    for i in order:
        if len(pieces[i]) == 1:
            yield i, None
            continue
        array, change = tensors[i]
        parts = [jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding) for rows in pieces[i]]
        if change is not None:
            parts = [jax.tree.map(lambda x: x.update(sharding=sharding), jax.eval_shape(change, x)) for x in parts]
        leaves, tree = jax.tree.flatten(parts)
        key = array.shape, tree, tuple(leaves)
        if key not in programs:
            programs[key] = compiler.submit(
                lambda parts, shape: _join.lower(parts, shape).compile(), parts, array.shape
            )
        yield i, programs[key]


def _pieces(array):
    """An array in pieces of rows [n, in] of at most PIECE_BYTES; or whole, in its own shape, where it is no larger."""
    if array.nbytes <= PIECE_BYTES or array.ndim == 1:
        return [array]
    rows = array.reshape(-1, array.shape[-1])
    step = max(1, PIECE_BYTES // rows[0].nbytes)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


@cache
def _libc():
    return ctypes.CDLL(None)


def advise(array, advice):
    """Tell the operating system what becomes of the pages that lie wholly inside an array of a memory map.

    advice is the name of one of the mmap module's constants; without madvise (Windows) nothing is told.
    """
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, advice):  # no madvise on Windows
        return
    start, end = array.ctypes.data, array.ctypes.data + array.nbytes
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        # not mmap's own method: that one keeps all other threads waiting meanwhile
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, advice))


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer's file in a folder; where there is none, the one that should be there."""
    return next((folder / name for name in TOKENIZERS if os.path.isfile(folder / name)), folder / TOKENIZERS[-1])


def check_vocabulary(tokenizer: Tokenizer, file, config: ModelConfig) -> None:
    """Raise ModelError unless the tokenizer has the model's tokens, or a few less: an embedding may be padded."""
    if not 0.9 * config.vocab_size <= tokenizer.vocab_size <= config.vocab_size:
        raise ModelError(
            f"{file} has {tokenizer.vocab_size} tokens, but the model has {config.vocab_size}: it belongs to another "
            f"model; name the right one with --tokenizer"
        )


def parameter_shapes(abstract: Params) -> dict[str, jax.ShapeDtypeStruct]:
    """The name of every tensor in a model's files, with its shape and dtype: `layers.0.wqkv.values` and the like."""
    return {_name(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]}


def _name(keys):
    return ".".join(str(key.idx if hasattr(key, "idx") else key.name) for key in keys)


def read_config(path: Path) -> tuple[ModelConfig, str | None, tuple[str, ...]]:
    """The ModelConfig of a model folder, how its matrices are quantized, and which are float all the same.

    Raises ModelError where its config.json is none, or another version's.
    """
    file = path / "config.json"
    if not os.path.isdir(path):  # of Path, .is_dir raises for a name that is too long
        raise ModelError(f"{path}: no such folder; --model takes a folder that `python -m jaxllm.convert` wrote")
    if not os.path.isfile(file):
        meta = any(path.glob("consolidated.*.pth"))
        hint = f", but Meta's .pth files: run python -m jaxllm.convert {path} OUT first" if meta else ""
        hint = hint or "; name one that python -m jaxllm.convert wrote"
        raise ModelError(f"{path} is not a model folder: it has no config.json{hint}")
    try:
        text = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}; convert the model again") from None
    if not isinstance(text, dict) or text.get("format") != "jaxllm":
        raise ModelError(f'{file} is not jaxllm\'s: it has no "format": "jaxllm"; convert the checkpoint first')
    if text.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"{file} has format_version={text.get('format_version')!r}, and this jaxllm reads {FORMAT_VERSION}; "
            f"convert the checkpoint again, or install the jaxllm that wrote it"
        )
    quantize, floats = text.get("quantization"), text.get("float", list(NORMS))
    if quantize not in (None, *SCHEMES):
        raise ModelError(f"{file} has quantization={quantize!r}; this jaxllm reads null, {', '.join(SCHEMES)}")
    names = isinstance(floats, list) and all(isinstance(name, str) for name in floats)
    if not names or not {*NORMS} <= {*floats} <= {*NORMS, *MATRICES}:
        raise ModelError(
            f"{file} has float={str(floats)[:200]}; it lists {', '.join(NORMS)}, and besides any of "
            f"{', '.join(MATRICES)}"
        )
    keep_float = tuple(name for name in MATRICES if name in floats) if quantize else ()
    try:
        return ModelConfig.from_json(text.get("config")), quantize, keep_float
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None


def expected_shapes(
    path: Path, config: ModelConfig, quantize: str | None, keep_float: Collection[str], count: int, hold: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `read_config` of a folder with `count` arrays makes them, by name.

    Raises ModelError where its config.json cannot be of that folder; hold says what is in it, and what to do.
    """
    file = path / "config.json"
    if config.n_layers > count:  # before names are made for so many
        raise ModelError(f"{file} has n_layers={config.n_layers}, but {hold}")
    try:
        return parameter_shapes(abstract_params(config, quantize, keep_float))
    except InputError as error:  # the output of a tied model
        raise ModelError(f"{file}: {error}") from None


def _read_tensors(path, config, quantize, keep_float):
    """Views of all tensors in a folder's *.safetensors, checked against what the config makes them; and these files."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} has a config.json but no *.safetensors; convert the checkpoint again")
    mapped = [_map(file) for file in files]
    found = [(file.path, name, array) for file, data in mapped for name, array in _read_map(file.path, data).items()]
    hold = f"the *.safetensors hold {len(found)} tensors; convert the checkpoint again"
    expected = expected_shapes(path, config, quantize, keep_float, len(found), hold)
    tensors = {}
    for file, name, array in found:
        if name in tensors or name not in expected:
            what = "a second time" if name in tensors else "which this model does not have"
            raise ModelError(f"{file} holds tensor {name[:100]!r} {what}; convert the checkpoint again")
        want = expected[name]
        if array.shape != want.shape or array.dtype != want.dtype:
            raise ModelError(
                f"{file}: {name} is {array.dtype}{list(array.shape)}, but config.json makes it "
                f"{want.dtype}{list(want.shape)}; convert the checkpoint again"
            )
        tensors[name] = array
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} tensors are in no *.safetensors, {missing[0]!r} first; convert the checkpoint "
            f"again"
        )
    return tensors, tuple(file for file, _ in mapped)


def read_safetensors(file) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, as read-only views into a memory map: nothing is read until it is used.

    The header is not trusted: raises ModelError when it is not JSON, or an entry has an unknown dtype or a wrong size,
    or the tensors do not fill the rest of the file without gap or overlap.
    """
    mapped, data = _map(Path(file))
    mapped.opened.close()  # the map does not need it
    return _read_map(mapped.path, data)


def _map(file):
    """A MappedFile, and its memory map."""
    try:
        opened = file.open("rb")
        state = os.fstat(opened.fileno())
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if state.st_size else b""
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    return MappedFile(file, opened, state.st_size, state.st_mtime_ns), data


def _read_map(file, data):
    def damaged(what):
        return ModelError(f"{file}: {what}; the file is damaged or not safetensors, so make or download it again")

    size = len(data)
    if size < 8:
        raise damaged(f"it has {size} bytes, less than a header")
    length = int.from_bytes(data[:8], "little")
    if length > min(size - 8, MAX_HEADER):
        raise damaged(f"it claims a header of {length} bytes, and the file has {size}")
    try:
        header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")

    header.pop("__metadata__", None)
    start = 8 + length
    tensors, spans = {}, []
    for name, entry in header.items():
        shown = repr(name[:100])
        try:
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            sizes = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            raise damaged(f"its entry for {shown} is {str(entry)[:200]!r}") from None
        whole = type(shape) is list and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in sizes)
        # NumPy takes no [0, 2**63] either
        if not whole or math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
            raise damaged(f"its entry for {shown} is {str(entry)[:200]!r}")
        if end - begin != math.prod(shape) * dtype.itemsize or end > size - start:
            raise damaged(f"{shown} is {entry['dtype']}{shape} at bytes {begin} to {end} of {size - start}")
        spans.append((begin, end, shown))
        tensors[name] = np.frombuffer(data, np.uint8, end - begin, start + begin).view(dtype).reshape(shape)
    filled = 0
    for begin, end, shown in sorted(spans):
        if begin != filled:
            raise damaged(f"{shown} begins at byte {begin}, and what lies before it ends at byte {filled}")
        filled = end
    if filled != size - start:
        raise damaged(f"its tensors end at byte {filled} of {size - start}")
    return tensors


def _unique_keys(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def save(
    path,
    config: ModelConfig,
    weights: Mapping[str, Weight],
    files: Mapping[str, Path | bytes],
    quantize: str | None = None,
    keep_float: Collection[str] = (),
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write a model folder from weights, named as `parameter_shapes(abstract_params(config))`, block by block.

    files are the others of the folder, by name, as paths or content: one of TOKENIZERS at least.
    Matrices are quantized as quantize and keep_float say (see `abstract_params`), unless their weights are so already,
    and else stored in config.dtype, like the norms.  progress is called with the number of bytes written, again and
    again.  The folder appears under its name when it is whole; whatever goes wrong before leaves nothing behind.  An
    existing model folder is replaced only with overwrite, and anything else never.
    Raises ModelError when the folder exists or cannot be written, or a weight is too large for the dtype, or not finite
    and to be quantized.
    """
    expected = parameter_shapes(abstract_params(config))
    shapes = parameter_shapes(abstract_params(config, quantize, keep_float))
    assert weights.keys() == expected.keys() and all(weights[n].shape == expected[n].shape for n in expected)
    header, offsets, total = safetensors_header(shapes)
    remedy = "" if quantize else ", or a smaller model with --quantize int8"
    with new_folder(Path(path), total, overwrite, remedy=remedy) as folder:
        file = folder / "model.safetensors"
        file.write_bytes(header)
        os.truncate(file, total)  # weights go into their places in any order

        turn, stop = threading.Lock(), threading.Event()

        def count(number):
            if stop.is_set():  # something failed, or the user does not want to wait
                raise CancelledError
            with turn:
                progress(number)

        def write(name):
            scheme = matrix_scheme(name.rpartition(".")[2], quantize, keep_float)
            with not_written(path, name):
                _write_weight(file, name, weights[name], scheme, config.dtype, offsets, count)

        # several at a time: while one waits for the disk, another one is converted
        with ThreadPoolExecutor(WRITERS) as threads:
            try:
                for written in [threads.submit(write, name) for name in weights]:
                    written.result()
            except BaseException:
                stop.set()
                threads.shutdown(cancel_futures=True)
                raise
        write_files(folder, files)
        # last: a folder without it is not a model
        (folder / "config.json").write_text(config_text(config, quantize, keep_float))


def write_files(folder: Path, files: Mapping[str, Path | bytes]) -> None:
    """Write files, given as paths or content, into a folder by these names."""
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


def config_text(config: ModelConfig, quantize: str | None = None, keep_float: Collection[str] = ()) -> str:
    """The config.json of a model folder, whose matrices are as `abstract_params` says for these arguments."""
    text = {"format": "jaxllm", "format_version": FORMAT_VERSION, "quantization": quantize}
    if quantize:
        text["float"] = [*NORMS, *keep_float]
    return json.dumps(text | {"config": config.to_json()}, indent=2) + "\n"


def is_model_folder(path: Path) -> bool:
    """Whether a folder's config.json says that it is of jaxllm's format, whatever its version."""
    try:
        text = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(text, dict) and text.get("format") == "jaxllm"


@contextmanager
def not_written(path: Path, *weight: str) -> Iterator[None]:
    """Raise a ValueError, of a weight whose numbers cannot be stored so, as the ModelError of the folder to write."""
    try:
        yield
    except ModelError:  # the source cannot be read
        raise
    except ValueError as error:
        raise ModelError(f"{path} was not written: {' '.join([*weight, str(error)])}") from None


@contextmanager
def new_folder(
    path: Path,
    size: int,
    overwrite: bool = False,
    replaces: Callable[[Path], bool] = is_model_folder,
    kind: str = "model",
    remedy: str = "",
) -> Iterator[Path]:
    """A folder to write into, which gets the name `path` at the end; whatever goes wrong before leaves nothing behind.

    size is that of what will be written, in bytes.  An existing folder is replaced only with overwrite, and only if
    it is empty or replaces(path) holds, and anything else never; kind is what messages call such a folder, and remedy
    what they add where the disk is too small.
    Raises ModelError when path exists or cannot be written.
    """
    if os.path.lexists(path):
        if not overwrite:
            raise ModelError(f"{path} exists; choose another folder, or replace the model in it with --overwrite")
        if not _is_empty(path) and not replaces(path):
            raise ModelError(
                f"{path} is not a {kind} folder, so --overwrite does not replace it; choose another folder"
            )
    new = [folder for folder in path.parents if not os.path.exists(folder)]  # from the innermost
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise ModelError(
                f"{path}: the model takes {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free; "
                f"free some or choose another disk{remedy}"
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
        _put_in_place(temporary, path)
        new = []
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror}; nothing was left behind") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in new:
            with suppress(OSError):  # not made after all, or used by someone else
                folder.rmdir()


def _is_empty(path):
    try:
        return not any(path.iterdir())
    except OSError:
        return False


def _put_in_place(folder, path):
    """Rename a folder to path; what is there stays there when that fails, and else is removed."""
    if not os.path.lexists(path):
        folder.rename(path)
        return
    old = folder.with_name(f"{folder.name}-old")
    try:
        path.rename(old)
        folder.rename(path)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def safetensors_header(
    shapes: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """The header for tensors of these shapes and dtypes, where the bytes of each start in the file, the file's size."""
    code = {dtype: name for name, dtype in _DTYPES.items()}
    size = {name: math.prod(s.shape) * s.dtype.itemsize for name, s in shapes.items()}
    entries, begin = {} if metadata is None else {"__metadata__": dict(metadata)}, 0
    # the format allows no gaps: sizes that would push the next tensor off its alignment go last
    for name in sorted(shapes, key=lambda n: size[n] % ALIGNMENT != 0):
        end = begin + size[name]
        entries[name] = {
            "dtype": code[shapes[name].dtype],
            "shape": list(shapes[name].shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # padding with spaces is part of the format
    start = 8 + len(text)
    offsets = {name: start + entries[name]["data_offsets"][0] for name in shapes}
    return len(text).to_bytes(8, "little") + text, offsets, start + begin


def _write_weight(file, name, weight, scheme, dtype, offsets, progress):
    """Write a weight's blocks to where the header puts them: with a scheme as int8 values and scales, else in dtype."""
    at = dict(offsets)
    with file.open("r+b") as opened:

        def put(part, array):
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            opened.seek(at[part])
            opened.write(raw)
            at[part] += raw.nbytes
            progress(raw.nbytes)

        for block in weight.blocks():
            if scheme is None:
                put(name, cast(block, dtype))
            else:
                quantized = block if isinstance(block, QTensor) else quantize_weight(block, scheme)
                put(f"{name}.values", quantized.values)
                put(f"{name}.scale", quantized.scale)


def cast(block: np.ndarray, dtype: str) -> np.ndarray:
    """A float array as dtype.  Raises ValueError for a number that is finite and would not be any more."""
    if block.dtype == dtype:
        return block
    if block.dtype == np.float32 and dtype == "float16" and block.size >= MANY:
        narrowed, lost = _narrow(block)  # numpy takes four times as long
    else:
        with np.errstate(over="ignore"):
            narrowed = block.astype(dtype)
        infinite = ~np.isfinite(narrowed)
        lost = infinite.any() and np.isfinite(block[infinite]).any()
    if lost:
        raise ValueError(f"holds a number that {dtype} cannot express; choose another --dtype")
    return np.asarray(narrowed)


@jax.jit
def _narrow(x):
    narrowed = x.astype(jnp.float16)
    return narrowed, jnp.any(jnp.isinf(narrowed) & jnp.isfinite(x))

"""Model folders: config.json, *.safetensors and the tokenizer's own file; memory-mapped to read, written as a stream.

safetensors: https://github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""

import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.errors import InputError, ModelError
from jaxllm.model import Params, abstract_params
from jaxllm.pipeline import enable_compilation_cache
from jaxllm.quantize import quantize as quantize_weight
from jaxllm.tensor import QTensor
from jaxllm.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
ALIGNMENT = 64  # bytes: where a tensor starts so, a CPU device can use the map itself
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
TOKENIZER = "tokenizer.model"
DEMO = Path(__file__).parent / "demo"

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
class Model:
    """A loaded model: what `forward` and `generate` need."""

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Weight:
    """A float tensor that is read when it is written: blocks() yields rows, [n, in] at a time (of a norm [D], all)."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]


def load(path=None, quantize: str | None = None, dtype: str | None = None, tokenizer=None) -> Model:
    """Load a model folder (by default the small model inside the package) onto JAX's default device.

    quantize="int8" quantizes the matrices of a float model while it is read.  dtype, "float32" or "bfloat16", is the
    type of activations and cache: float32 by default on CPUs and for float32 models, else bfloat16.  Float weights
    that are wider are narrowed to it; narrower ones stay as they are stored, because widening adds bytes and no
    information.  tokenizer is a file to use instead of the folder's own.
    On a CPU the arrays are the memory map itself.  Turns on the persistent compilation cache unless the user has one.
    Raises ModelError naming the file when the folder is not a model, or is damaged.
    """
    if quantize not in (None, "int8"):
        raise InputError(f"quantize is {quantize!r}; it must be int8 or None")
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
    enable_compilation_cache()
    path = DEMO if path is None else Path(path)
    config, quantized = _read_config(path)
    tokenizer_file = Path(tokenizer or path / TOKENIZER)
    reader = load_tokenizer(tokenizer_file)
    check_vocabulary(reader, tokenizer_file, config)
    tensors = _read_tensors(path, config, quantized)
    abstract = abstract_params(config, quantized)

    if dtype is None:
        dtype = "float32" if config.dtype == "float32" or jax.default_backend() == "cpu" else "bfloat16"

    def place(keys, weight):
        if isinstance(weight, QTensor):
            return jax.device_put(weight)
        if quantize and weight.ndim > 1:
            try:
                return jax.device_put(quantize_weight(weight))
            except ValueError as error:
                raise ModelError(f"{path}: {_name(keys)} {error}") from None
        narrows = weight.dtype.itemsize >= jnp.dtype(dtype).itemsize
        return jax.device_put(weight.astype(dtype) if narrows and weight.dtype != dtype else weight)

    stored = jax.tree_util.tree_map_with_path(lambda keys, _: tensors[_name(keys)], abstract)
    params = jax.tree_util.tree_map_with_path(place, stored, is_leaf=lambda node: isinstance(node, QTensor))
    return Model(params, replace(config, dtype=dtype), reader)


def check_vocabulary(tokenizer: Tokenizer, file, config: ModelConfig) -> None:
    """Raise ModelError unless the tokenizer has as many tokens as the model."""
    if tokenizer.vocab_size != config.vocab_size:
        raise ModelError(
            f"{file} has {tokenizer.vocab_size} tokens, but the model has {config.vocab_size}: it belongs to another "
            f"model; name the right one with --tokenizer"
        )


def parameter_shapes(abstract: Params) -> dict[str, jax.ShapeDtypeStruct]:
    """The name of every tensor in a model's files, with its shape and dtype: `layers.0.wqkv.values` and the like."""
    return {_name(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]}


def _name(keys):
    return ".".join(str(key.idx if hasattr(key, "idx") else key.name) for key in keys)


def _read_config(path):
    """The ModelConfig of a model folder, and whether its matrices are int8."""
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
    quantization = text.get("quantization")
    if quantization not in (None, "int8"):
        raise ModelError(f"{file} has quantization={quantization!r}; this jaxllm reads null and 'int8'")
    try:
        return ModelConfig.from_json(text.get("config")), quantization == "int8"
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None


def _read_tensors(path, config, quantized):
    """Views of all tensors in a folder's *.safetensors, checked against the names, shapes and dtypes of the config."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} has a config.json but no *.safetensors; convert the checkpoint again")
    found = [(file, name, array) for file in files for name, array in read_safetensors(file).items()]
    if config.n_layers > len(found):  # before names are made for so many
        raise ModelError(
            f"{path / 'config.json'} has n_layers={config.n_layers}, but the *.safetensors hold {len(found)} tensors; "
            f"convert the checkpoint again"
        )
    expected = parameter_shapes(abstract_params(config, quantized))
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
    return tensors


def read_safetensors(file) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, as read-only views into a memory map: nothing is read until it is used.

    The header is not trusted: raises ModelError when it is not JSON, or an entry has an unknown dtype or a wrong size,
    or the tensors do not fill the rest of the file without gap or overlap.
    """
    file = Path(file)

    def damaged(what):
        return ModelError(f"{file}: {what}; the file is damaged or not safetensors, so make or download it again")

    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size < 8:
                raise damaged(f"it has {size} bytes, less than a header")
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
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
    tokenizer_file,
    quantize: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write a model folder from float weights, named as `parameter_shapes(abstract_params(config))`, block by block.

    Matrices are quantized with quantize="int8", and else stored in config.dtype, like the norms.  progress is called
    with the number of bytes written, again and again.  The folder appears under its name when it is whole; whatever
    goes wrong before leaves nothing behind.  An existing model folder is replaced only with overwrite, and anything
    else never.
    Raises ModelError when the folder exists or cannot be written, or a weight is too large for the dtype, or not finite
    and to be quantized.
    """
    path = Path(path)
    if os.path.lexists(path):
        if not overwrite:
            raise ModelError(f"{path} exists; choose another folder, or replace the model in it with --overwrite")
        if not _may_be_replaced(path):
            raise ModelError(f"{path} is not a model folder, so --overwrite does not replace it; choose another folder")
    expected = parameter_shapes(abstract_params(config))
    shapes = parameter_shapes(abstract_params(config, quantize is not None))
    assert weights.keys() == expected.keys() and all(weights[n].shape == expected[n].shape for n in expected)
    header, offsets, total = _safetensors_header(shapes)

    new = [folder for folder in path.parents if not os.path.exists(folder)]  # from the innermost
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if total > free:
            raise ModelError(
                f"{path}: the model takes {total / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free; "
                f"free some or choose another disk" + ("" if quantize else ", or a smaller model with --quantize int8")
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        with (temporary / "model.safetensors").open("wb") as file:
            file.write(header)
            for name, weight in weights.items():
                try:
                    _write_weight(file, name, weight, config, offsets, progress)
                except ValueError as error:
                    raise ModelError(f"{path} was not written: {name} {error}") from None
            file.truncate(total)  # an empty tensor at the end writes nothing
        shutil.copyfile(tokenizer_file, temporary / TOKENIZER)
        text = {"format": "jaxllm", "format_version": FORMAT_VERSION, "quantization": quantize}
        text["config"] = config.to_json()
        # last: a folder without it is not a model
        (temporary / "config.json").write_text(json.dumps(text, indent=2) + "\n")
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


def _may_be_replaced(path):
    """Whether a path is a model folder, whatever its version, or an empty folder."""
    try:
        if not any(path.iterdir()):
            return True
        text = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(text, dict) and text.get("format") == "jaxllm"


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


def _safetensors_header(shapes):
    """The header for tensors of these shapes and dtypes, where the bytes of each start in the file, the file's size."""
    code = {dtype: name for name, dtype in _DTYPES.items()}
    size = {name: math.prod(s.shape) * s.dtype.itemsize for name, s in shapes.items()}
    entries, begin = {}, 0
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
    offsets = {name: start + entry["data_offsets"][0] for name, entry in entries.items()}
    return len(text).to_bytes(8, "little") + text, offsets, start + begin


def _write_weight(file, name, weight, config, offsets, progress):
    """Write a weight's blocks to where the header puts them, as int8 values and scales if it has a place for these."""
    written = {}

    def put(part, array):
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        file.seek(offsets[part] + written.get(part, 0))
        file.write(raw)
        written[part] = written.get(part, 0) + raw.nbytes
        progress(raw.nbytes)

    for block in weight.blocks():
        if name in offsets:
            put(name, _cast(block, config.dtype))
        else:
            quantized = quantize_weight(block)
            put(f"{name}.values", quantized.values)
            put(f"{name}.scale", quantized.scale)


def _cast(block, dtype):
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore"):
        cast = block.astype(dtype)
    lost = ~np.isfinite(cast)
    if lost.any() and np.isfinite(block[lost]).any():
        raise ValueError(f"holds a number that {dtype} cannot express; choose another --dtype")
    return cast

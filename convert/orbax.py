"""Orbax checkpoints of our `Params`, for JAX training code: written for it, and read when it gives them back.

A folder with config.json and the tokenizer's files, as in a model folder, and `params/`, which is what Orbax's
StandardCheckpointer saves and restores: an array for each leaf by a name such as `layers.0.wqkv`, in tensorstore's zarr
formats within its ocdbt database, and `_METADATA`, which describes the tree.  Source: Orbax's guide to its checkpoint
format.  Orbax takes and gives whole trees; tensorstore, by which it reads and writes, does an array at a time.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxllm.config import DTYPES
from jaxllm.convert.checkpoint import (
    BLOCK,
    Checkpoint,
    carried_files,
    check_file,
    float_blocks,
    join_blocks,
    read_json,
)
from jaxllm.errors import InputError, ModelError
from jaxllm.loader import (
    Weight,
    check_scale,
    config_text,
    expected_shapes,
    new_folder,
    not_written,
    parameter_shapes,
    read_config,
    write_files,
)
from jaxllm.model import Params, abstract_params, matrix_scheme
from jaxllm.tensor import QTensor

PARAMS, METADATA = "params", "_METADATA"
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
CHUNK = 8 << 20  # bytes written as one piece of an array: what a device that restores a part has to read of it
_AGAIN = "save it again with orbax.checkpoint.StandardCheckpointer().save"


def matches(source: Path) -> bool:
    """Whether source is a folder with an Orbax checkpoint in params/, or is one itself."""
    return os.path.isdir(source / PARAMS) or os.path.isfile(source / METADATA)


def open_checkpoint(source: Path, tokenizer_file: Path | None = None, dtype: str | None = None) -> Checkpoint:
    """Open a folder as `save_checkpoint` writes it, or as training code does with the same files in it.

    dtype is what float weights are to be stored as, by default what they are, and where they differ what config.json
    says; what is int8 stays so.  tokenizer_file is used in place of the folder's own.
    Raises ModelError naming the file when something is missing, or the tree or its sizes are not what config.json
    makes them; InputError without tensorstore.
    """
    if not os.path.isfile(source / "config.json"):
        raise ModelError(
            f"{source / 'config.json'} is missing; the Orbax checkpoint goes into {PARAMS}/ of a folder with the "
            f"config.json and the tokenizer of the model that was trained"
        )
    config, quantize, keep_float = read_config(source)
    files = carried_files(source, tokenizer_file)
    arrays = _open_arrays(source, config, quantize, keep_float)
    names = parameter_shapes(abstract_params(config))
    stored = {arrays[name].dtype.name for name in names if name in arrays}
    dtype = dtype or (stored.pop() if len(stored) == 1 else config.dtype)
    weights = {}
    for name, leaf in names.items():
        if name in arrays:
            read = partial(_float_blocks, source, name, arrays[name])
        else:
            int8_inputs = matrix_scheme(name.rpartition(".")[2], quantize, keep_float) == "w8a8"
            parts = arrays[f"{name}.values"], arrays[f"{name}.scale"]
            read = partial(_quantized_blocks, source, name, *parts, int8_inputs)
        weights[name] = Weight(leaf.shape, read)
    return Checkpoint(replace(config, dtype=dtype), weights, files, quantize, keep_float)


def _tensorstore():
    try:
        import tensorstore
    except ImportError:
        raise InputError("Orbax checkpoints need orbax-checkpoint; run pip install 'jaxllm[orbax]'") from None
    return tensorstore


# Reading


def _open_arrays(source, config, quantize, keep_float):
    """A tensorstore for each leaf by its name, checked against config.json, and nothing of it read yet."""
    tensorstore = _tensorstore()
    file = source / PARAMS / METADATA
    check_file(file)
    metadata = read_json(file)
    names = _leaf_names(file, metadata)
    hold = f"{file} names {len(names)} arrays; is it another model's?"
    expected = expected_shapes(source, config, quantize, keep_float, len(names), hold)
    kind = f"a model with quantization={quantize}, tied={config.tied} and {config.n_layers} layers"
    for name in sorted(names ^ expected.keys()):
        what = "has {!r}, which {} does not have" if name in names else "lacks {!r}, which {} has"
        raise ModelError(f"{file} {what.format(name[:100], kind)}; does config.json belong to it?")

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})
    arrays = {}
    for name, want in expected.items():
        array = _open_array(tensorstore, context, source, name, metadata)
        found = array.dtype.numpy_dtype
        exact = name.endswith((".values", ".scale"))
        right = found == want.dtype if exact else found.name in DTYPES
        if array.shape != want.shape or not right:
            raise ModelError(
                f"{source / PARAMS}: {name} is {found}{list(array.shape)}, and config.json makes it "
                f"{want.dtype}{list(want.shape)}; is it another model's?"
            )
        grid = array.chunk_layout
        for chunk in (grid.read_chunk.shape, grid.write_chunk.shape):
            # a piece is read whole, whatever is asked of it
            if chunk is None or any(map(_larger, chunk, want.shape)):
                raise ModelError(
                    f"{source / PARAMS}: {name} {list(want.shape)} is stored in pieces of {chunk}; {_AGAIN}"
                )
        arrays[name] = array
    return arrays


def _larger(piece, size):
    return piece is None or piece > max(size, 1)


def _leaf_names(file, metadata):
    """The names of the arrays that a _METADATA lists."""
    names = set()
    try:
        for entry in metadata["tree_metadata"].values():
            if entry["value_metadata"]["skip_deserialize"] is False:  # True: None, of what a model does not have
                names.add(".".join(key["key"] for key in entry["key_metadata"]))
    except (KeyError, TypeError, AttributeError):
        raise ModelError(f"{file} is no description of a tree as Orbax writes it; {_AGAIN}") from None
    return names


def _open_array(tensorstore, context, source, name, metadata):
    folder = {"driver": "file", "path": f"{source.resolve() / PARAMS}/"}
    if metadata.get("use_ocdbt"):
        store = {"driver": "ocdbt", "base": folder, "path": f"{name}/"}
    else:
        store = folder | {"path": f"{folder['path']}{name}/"}
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        "kvstore": store,
        # what is all zeros is left out only by who says so
        "fill_missing_data_reads": metadata.get("store_array_data_equal_to_fill_value") is not True,
    }
    try:
        return tensorstore.open(spec, read=True, context=context).result()
    except Exception as error:  # its C++ code raises what Python has for each status
        raise _unreadable(source, name, error) from None


def _unreadable(source, name, error):
    reason = " ".join(str(error).split())[:200]
    return ModelError(f"{source / PARAMS}: {name} cannot be read ({reason}); {_AGAIN}")


def _rows(source, name, array) -> Iterator[np.ndarray]:
    """An array in ranges of its first axis: whole pieces, and at most BLOCK elements where pieces are so small."""
    size, piece = array.shape[0], array.chunk_layout.read_chunk.shape[0]
    step = max(1, BLOCK // math.prod(array.shape[1:]) // piece) * piece
    try:
        for start in range(0, size, step):
            yield array[start : min(start + step, size)].read().result()
    except Exception as error:  # as above
        raise _unreadable(source, name, error) from None


def _float_blocks(source, name, array):
    for rows in _rows(source, name, array):
        yield rows.reshape(-1, array.shape[-1])


def _quantized_blocks(source, name, values, scale, int8_inputs):
    scales, start = np.concatenate([*_rows(source, f"{name}.scale", scale)]), 0
    for rows in _rows(source, f"{name}.values", values):
        of_rows = scales[start : start + len(rows)]
        check_scale(source / PARAMS, name, rows, of_rows)
        of_rows = of_rows.reshape(-1, *scales.shape[rows.ndim - 1 :])
        yield QTensor(rows.reshape(-1, rows.shape[-1]), of_rows, int8_inputs)
        start += len(rows)


# Writing


def save_checkpoint(
    out: Path,
    checkpoint: Checkpoint,
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a folder whose params/ Orbax restores as `Params`, float in config.dtype or int8, whichever they are.

    progress is called with the number of bytes written, again and again.  The folder appears when it is whole; an
    existing one, or a model folder, is replaced only with overwrite, and anything else never.
    Raises ModelError when the folder exists or cannot be written, InputError without tensorstore.
    """
    tensorstore = _tensorstore()
    config, scheme = checkpoint.config, (checkpoint.quantized, checkpoint.keep_float)
    abstract = abstract_params(config, *scheme)
    shapes = parameter_shapes(abstract)
    total = sum(shape.size * shape.dtype.itemsize for shape in shapes.values())
    with new_folder(out, total, overwrite) as folder:
        (folder / PARAMS).mkdir()
        context = tensorstore.Context({"file_io_sync": False})
        for name, weight in checkpoint.weights.items():
            with not_written(out, name):
                arrays = _whole(name, weight, shapes)
            while arrays:
                leaf, array = arrays.popitem()
                _write_array(tensorstore, context, folder / PARAMS, leaf, array)
                if progress is not None:
                    progress(array.nbytes)
        (folder / PARAMS / METADATA).write_text(_metadata(abstract))
        (folder / PARAMS / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": _HANDLER}))
        write_files(folder, checkpoint.files)
        # last: a folder without it is not a model
        (folder / "config.json").write_text(config_text(config, *scheme))


def _whole(name, weight, shapes):
    """A weight's arrays by their names in shapes: one, or values and scale."""
    if name in shapes:
        dtype = shapes[name].dtype
        return {name: join_blocks(float_blocks(weight, dtype.name), weight.shape, dtype)}
    scales = []

    def values():
        for block in weight.blocks():
            scales.append(block.scale)
            yield block.values

    joined = join_blocks(values(), weight.shape, np.int8)
    scale = join_blocks(scales, shapes[f"{name}.scale"].shape, np.float32)
    return {f"{name}.values": joined, f"{name}.scale": scale}


def _write_array(tensorstore, context, folder, name, array):
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}, "path": f"{name}/"}
    metadata = {"shape": array.shape, "chunks": _pieces(array.shape, array.itemsize), "compressor": None}
    metadata["dtype"] = "bfloat16" if array.dtype.name == "bfloat16" else array.dtype.str
    spec = {"driver": "zarr", "kvstore": store, "metadata": metadata, "store_data_equal_to_fill_value": True}
    try:
        tensorstore.open(spec, create=True, context=context).result().write(array).result()
    except Exception as error:  # its C++ code raises what Python has for each status
        raise OSError(None, " ".join(str(error).split())[:200]) from None


def _pieces(shape, itemsize):
    """The shape of pieces of at most CHUNK bytes: fewer of the first axes, so that a piece is contiguous."""
    pieces = list(shape)
    for axis in range(len(shape)):
        while math.prod(pieces) * itemsize > CHUNK and pieces[axis] > 1:
            pieces[axis] = -(-pieces[axis] // 2)
    return pieces


def _metadata(abstract: Params) -> str:
    """The text of _METADATA: every leaf of the tree by its path, the absent ones too, so that trees can be compared."""
    tree = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract, is_leaf=lambda node: node is None)[0]:
        # 1 is an index, 2 a name
        path = [
            {"key": str(k.idx), "key_type": 1} if hasattr(k, "idx") else {"key": k.name, "key_type": 2} for k in keys
        ]
        value = {"value_type": "None" if leaf is None else "jax.Array", "skip_deserialize": leaf is None}
        tree[str(tuple(key["key"] for key in path))] = {"key_metadata": path, "value_metadata": value}
    settings = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    return json.dumps({"tree_metadata": tree, **settings, "custom_metadata": None})

"""Model folders of jaxllm's own, as `loader.save` writes them: on the way to the other formats."""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from jaxllm.convert.checkpoint import Checkpoint, Mapped, blocks, carried_files, row_ranges
from jaxllm.loader import Folder, Weight, check_scale, is_model_folder, open_folder, parameter_shapes
from jaxllm.model import abstract_params, matrix_scheme
from jaxllm.tensor import QTensor


def matches(source: Path) -> bool:
    """Whether source is a folder with a config.json of ours, and not one for Orbax."""
    return is_model_folder(source) and not os.path.isdir(source / "params")


def open_checkpoint(source: Path, tokenizer_file: Path | None = None, dtype: str | None = None) -> Checkpoint:
    """Open a model folder; what is int8 stays so.

    dtype is what float weights are to be stored as, by default what they are.  tokenizer_file is used in place of the
    folder's own.
    Raises ModelError naming the file when the folder is not a model, or sizes or types differ from its config.json's.
    """
    folder = open_folder(source, tokenizer_file)
    config = replace(folder.config, dtype=dtype or folder.config.dtype)
    weights = {
        name: Weight(leaf.shape, partial(_blocks, folder, name))
        for name, leaf in parameter_shapes(abstract_params(config)).items()
    }
    return Checkpoint(config, weights, carried_files(source, tokenizer_file), folder.quantize, folder.keep_float)


def _blocks(folder: Folder, name: str) -> Iterator:
    """The rows of a weight: float, or QTensors."""
    if name in folder.tensors:
        tensor = folder.tensors[name]
        yield from blocks(Mapped(tensor.reshape(-1, tensor.shape[-1])))
        return
    values, scale = (folder.tensors[f"{name}.{part}"] for part in ("values", "scale"))
    # a scale has the axes of the values but for the last one, which it has for groups, or not at all
    scale = Mapped(scale.reshape(-1, *scale.shape[values.ndim - 1 :]))
    values = Mapped(values.reshape(-1, values.shape[-1]))
    scheme = matrix_scheme(name.rpartition(".")[2], folder.quantize, folder.keep_float)
    for start, stop in row_ranges(values.shape):
        rows = QTensor(values.rows(start, stop), scale.rows(start, stop), int8_inputs=scheme == "w8a8")
        check_scale(folder.path, name, rows.values, rows.scale)
        yield rows

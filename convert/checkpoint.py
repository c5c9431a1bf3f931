"""What every format of a checkpoint comes down to: a config, weights by the model folder's names, a tokenizer."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.errors import ModelError
from jaxllm.loader import TOKENIZERS, Weight, advise, cast
from jaxllm.model import matrix_scheme
from jaxllm.quantize import column_fill, column_gain, dequantize, divide_up, equalizes
from jaxllm.quantize import quantize as quantize_weight
from jaxllm.tensor import QTensor

# elements read and written at a time: memory does not grow with the model, and what one step of a conversion makes is
# still in the processor's cache for the next
BLOCK = 1 << 20
MAX_JSON = 16 << 20  # bytes; the index of a model with 100 000 tensors has 10 MB
CARRIED = (
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"
)  # fmt: skip
# the weights of a model folder that hold several parts, in this order
FUSED = {"wqkv": ("q", "k", "v"), "qkv_bias": ("q_bias", "k_bias", "v_bias"), "w_gate_up": ("gate", "up")}
ALONE = {"wo": "o", "w_down": "down"}  # and those that hold one, of another name


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint opened for conversion: nothing of its weights was read yet.

    files go into the model folder by these names: the tokenizer (one of `loader.TOKENIZERS`), and what belongs to it.
    quantized (one of `quantize.SCHEMES`) and keep_float, as in `abstract_params`, say which matrices are int8 already:
    their weights yield QTensors.
    """

    config: ModelConfig
    weights: dict[str, Weight]
    files: dict[str, Path | bytes]
    quantized: str | None = None
    keep_float: tuple[str, ...] = ()


def quantize_checkpoint(checkpoint: Checkpoint, quantize: str, keep_float: Collection[str] = ()) -> Checkpoint:
    """A float checkpoint with its matrices as int8: arguments as in `abstract_params`.

    Its blocks raise ValueError where a weight is not finite.
    """

    @cache
    def gain(layer):
        blocks = checkpoint.weights[f"{layer}.w_down"].blocks()
        return column_gain(reduce(np.maximum, map(column_fill, blocks)))

    def down(layer, weight):
        for block in weight.blocks():
            yield quantize_weight(block.astype(np.float32) * gain(layer), quantize)

    def gate_up(layer, weight):
        start = 0
        for block in weight.blocks():
            yield divide_up(quantize_weight(block, quantize), gain(layer), start)
            start += len(block)

    def one(name, weight):
        layer, _, part = name.rpartition(".")
        scheme = matrix_scheme(part, quantize, keep_float)
        if scheme is None:
            return weight
        if part in ("w_down", "w_gate_up") and equalizes(quantize, keep_float):
            return Weight(weight.shape, partial(down if part == "w_down" else gate_up, layer, weight))
        return Weight(weight.shape, lambda: (quantize_weight(block, scheme) for block in weight.blocks()))

    weights = {name: one(name, weight) for name, weight in checkpoint.weights.items()}
    return replace(checkpoint, weights=weights, quantized=quantize, keep_float=tuple(keep_float))


# The files beside the weights


def read_json(file: Path) -> dict:
    """A file's JSON object.  Raises ModelError when there is none, or it is too large to be one."""
    check_file(file)
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ModelError(f"{file} is larger than {MAX_JSON >> 20} MiB; is it the right file?")
        settings = json.loads(data)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}); download it again") from None
    if not isinstance(settings, dict):
        raise ModelError(f"{file} is not a JSON object; download it again")
    return settings


def check_file(file: Path) -> None:
    """Raise ModelError unless this is a file, and not Git LFS's text in its place."""
    if not os.path.isfile(file):  # also because opening a pipe would wait for its writer
        raise ModelError(f"{file} is missing; download all files of the model, or check the path")
    try:
        with open(file, "rb") as opened:
            head = opened.read(64)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{file} is a Git LFS pointer, not the file it points to; run `git lfs pull` in its folder")


def carried_files(source: Path, tokenizer_file: Path | None = None) -> dict[str, Path]:
    """The files of a folder that go with its weights, by name; tokenizer_file is used in place of its own.

    Raises ModelError where one cannot be read, or there is no tokenizer.
    """
    files = {name: source / name for name in CARRIED if os.path.isfile(source / name)}
    if tokenizer_file is not None:
        check_file(tokenizer_file)
        files = {name: file for name, file in files.items() if name not in TOKENIZERS}
        files[tokenizer_name(tokenizer_file)] = tokenizer_file
    for file in files.values():
        check_file(file)
    if not any(name in files for name in TOKENIZERS):
        raise ModelError(
            f"{source} has neither {' nor '.join(TOKENIZERS)}; download the model's, or name one with --tokenizer"
        )
    return files


def tokenizer_name(file: Path) -> str:
    """The name that a tokenizer's file gets in a model folder, by content.  Raises ModelError if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(64).lstrip()
    except OSError as error:
        raise ModelError(
            f"{file}: cannot be read ({error.strerror}); give a tokenizer.model or tokenizer.json"
        ) from None
    return TOKENIZERS[0] if start.startswith(b"{") else TOKENIZERS[1]


# From a format's tensors to our weights


class Tensor(Protocol):
    """A tensor of a checkpoint, [rows, in] or [rows], that is read as it is asked for."""

    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, as an array of its own."""


@dataclass(frozen=True)
class Mapped:
    """A tensor in a memory-mapped file, read as dtype: by default as it is stored."""

    array: np.ndarray
    dtype: str | None = None

    @property
    def shape(self):
        return self.array.shape

    def rows(self, start, stop):
        """Rows start to stop, as an array of its own."""
        rows = np.array(self.array[start:stop], self.dtype, order="C")
        # pages of a mapped file that were read count as this process's memory until they are given back
        advise(self.array, "MADV_DONTNEED")
        return rows


def blocks(tensor: Tensor) -> Iterator[np.ndarray]:
    """All rows of a tensor, a bounded number at a time."""
    for start, stop in row_ranges(tensor.shape):
        yield tensor.rows(start, stop)


def row_ranges(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """All rows of a tensor of this shape, in ranges of at most BLOCK elements, or one row."""
    step = max(1, BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    return a.shape == b.shape and all(
        x.dtype == y.dtype and np.array_equal(x.view(np.uint8), y.view(np.uint8))
        for x, y in zip(blocks(a), blocks(b), strict=True)
    )


def half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder each head's rows from adjacent RoPE pairs (2i, 2i + 1) to pairs (i, i + H/2)."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def part_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by the names of `model_weights`, those of a layer without its number."""
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "embed": (config.vocab_size, config.dim),
        "output": (config.vocab_size, config.dim),
        "norm": (config.dim,),
        "attn_norm": (config.dim,),
        "q": (q_rows, config.dim),
        "k": (kv_rows, config.dim),
        "v": (kv_rows, config.dim),
        "q_bias": (q_rows,),
        "k_bias": (kv_rows,),
        "v_bias": (kv_rows,),
        "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,),
        "o": (config.dim, q_rows),
        "ffn_norm": (config.dim,),
        "gate": (config.ffn_dim, config.dim),
        "up": (config.ffn_dim, config.dim),
        "down": (config.dim, config.ffn_dim),
    }


def stored_shape(shapes: Mapping[str, tuple[int, ...]], parts: Sequence[str]) -> tuple[int, ...]:
    """The shape of a stored tensor that holds these parts of `part_shapes` one below the other."""
    return sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:]


def model_weights(
    config: ModelConfig, tensors: Mapping[str, Tensor], adjacent_pairs: bool = False
) -> dict[str, Weight]:
    """Every weight of the model folder, built as it is written from tensors by these names:

    embed, norm and (unless tied) output; of layer i `layers.i.` and attn_norm, q, k, v, o, ffn_norm, gate, up, down,
    with attention_bias q_bias, k_bias, v_bias, and with qk_norm q_norm, k_norm.  Heads are in order, each [H, in].
    adjacent_pairs says that RoPE rotates rows (2i, 2i + 1) of q and k, and not (i, i + H/2).
    """
    heads = (config.n_kv_heads, config.group + 2, config.head_dim)

    def plain(name):
        return Weight(tensors[name].shape, partial(blocks, tensors[name]))

    def fused(names, suffix=""):
        parts = [tensors[f"{name}{suffix}"] for name in names]
        return Weight((*heads, *parts[0].shape[1:]), partial(_qkv_blocks, config, *parts, adjacent_pairs))

    weights = {"embed": plain("embed")}
    for layer in (f"layers.{i}" for i in range(config.n_layers)):
        qkv = [f"{layer}.{name}" for name in "qkv"]
        gate, up = tensors[f"{layer}.gate"], tensors[f"{layer}.up"]
        weights |= {
            f"{layer}.attn_norm": plain(f"{layer}.attn_norm"),
            f"{layer}.wqkv": fused(qkv),
            f"{layer}.wo": plain(f"{layer}.o"),
            f"{layer}.ffn_norm": plain(f"{layer}.ffn_norm"),
            f"{layer}.w_gate_up": Weight((2, config.ffn_dim, config.dim), partial(_chain, gate, up)),
            f"{layer}.w_down": plain(f"{layer}.down"),
        }
        if config.attention_bias:
            weights[f"{layer}.qkv_bias"] = fused(qkv, "_bias")
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                weights[f"{layer}.{name}"] = _norm(tensors[f"{layer}.{name}"], config, adjacent_pairs)
    weights["norm"] = plain("norm")
    if not config.tied:
        weights["output"] = plain("output")
    return weights


def _norm(tensor, config, adjacent_pairs):
    """The gain of a norm over each head [H], in the order of the head's rows."""

    def whole() -> Iterator[np.ndarray]:
        rows = tensor.rows(0, config.head_dim)
        yield half_split(rows, config.head_dim) if adjacent_pairs else rows

    return Weight(tensor.shape, whole)


def _chain(*tensors):
    for tensor in tensors:
        yield from blocks(tensor)


def _qkv_blocks(config, q, k, v, adjacent_pairs):
    """For each kv head its query heads, then k, then v: the rows of wqkv, or of its bias."""
    size = config.head_dim
    order: Callable = half_split if adjacent_pairs else lambda rows, _: rows
    for head in range(config.n_kv_heads):
        of_q = q.rows(head * config.group * size, (head + 1) * config.group * size)
        of_k, of_v = (part.rows(head * size, (head + 1) * size) for part in (k, v))
        parts = [order(of_q, size), order(of_k, size), of_v]
        if len({part.dtype for part in parts}) > 1:  # numpy has no common type of float16 and bfloat16
            parts = [part.astype(np.float32) for part in parts]
        yield np.concatenate(parts)


# And back


def float_blocks(weight: Weight, dtype: str) -> Iterator[np.ndarray]:
    """The blocks of a weight as float arrays of dtype, dequantized where they are int8.

    Raises ValueError for a number that dtype cannot express.
    """
    for block in weight.blocks():
        yield cast(dequantize(block) if isinstance(block, QTensor) else block, dtype)


def join_blocks(blocks: Iterator[np.ndarray], shape: Sequence[int], dtype: str) -> np.ndarray:
    """A tensor of this shape from blocks of its rows."""
    joined, filled = np.empty(shape, dtype), 0
    flat = joined.reshape(-1)
    for block in blocks:
        flat[filled : filled + block.size] = block.reshape(-1)
        filled += block.size
    assert filled == flat.size
    return joined


def adjacent_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `half_split`."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def model_tensors(checkpoint: Checkpoint, adjacent: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `model_weights`: every tensor by its name there, whole, in config.dtype, one weight at a time.

    adjacent says that rows of q and k are to be in RoPE pairs (2i, 2i + 1).  Raises ValueError, which names the weight,
    for a number that config.dtype cannot express.
    """
    config = checkpoint.config
    for name, weight in checkpoint.weights.items():
        try:
            whole = join_blocks(float_blocks(weight, config.dtype), weight.shape, config.dtype)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        last = name.rpartition(".")[2]
        if last in ("wqkv", "qkv_bias"):
            group = config.group
            parts = [whole[:, :group], whole[:, group], whole[:, group + 1]]
            parts = [part.reshape(-1, *whole.shape[3:]) for part in parts]
        else:
            parts = list(whole) if last in FUSED else [whole]
        del whole  # where its parts are copies, memory is for one of the two
        for part_name in part_names(name):
            part = parts.pop(0)
            if adjacent and part_name.rpartition(".")[2] in ("q", "k", "q_bias", "k_bias", "q_norm", "k_norm"):
                part = adjacent_pairs(part, config.head_dim)
            yield part_name, part


def part_names(name: str) -> list[str]:
    """The names in `model_weights` of the tensors that a weight of the model folder is made of, in order."""
    prefix, dot, last = name.rpartition(".")
    return [f"{prefix}{dot}{part}" for part in FUSED.get(last, (ALONE.get(last, last),))]

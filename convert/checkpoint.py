"""What every format of a checkpoint comes down to: a config, weights by the model folder's names, a tokenizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.errors import ModelError
from jaxllm.loader import TOKENIZERS, Weight

BLOCK = 16 << 20  # elements read and written at a time, so that memory does not grow with the model


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint opened for conversion: nothing of its weights was read yet.

    files go into the model folder by these names: the tokenizer (one of `loader.TOKENIZERS`), and what belongs to it.
    """

    config: ModelConfig
    weights: dict[str, Weight]
    files: dict[str, Path | bytes]


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


class Tensor(Protocol):
    """A tensor of a checkpoint, [rows, in] or [rows], that is read as it is asked for."""

    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, as an array of its own."""


def blocks(tensor: Tensor) -> Iterator[np.ndarray]:
    """All rows of a tensor, a bounded number at a time."""
    step = max(1, BLOCK // max(1, int(np.prod(tensor.shape[1:]))))
    for start in range(0, tensor.shape[0], step):
        yield tensor.rows(start, min(start + step, tensor.shape[0]))


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

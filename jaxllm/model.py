"""The LLaMA forward pass: a pure function of parameters, tokens and a key-value cache.

Touvron et al. 2023: a pre-norm transformer with RMSNorm, rotary positions, SwiGLU and (from LLaMA-2 70B on)
grouped-query attention.  Shapes use the legend of `jaxllm.kernels.reference`, and L for the number of layers.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import ops
from jaxllm.config import ModelConfig
from jaxllm.errors import InputError
from jaxllm.kernels.reference import GROUP
from jaxllm.quantize import SCHEMES, column_fill, column_gain, divide_up, equalizes
from jaxllm.quantize import quantize as quantize_weight
from jaxllm.tensor import Array, QTensor

MATRICES = ("embed", "wqkv", "wo", "w_gate_up", "w_down", "output")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """One transformer block.  Fused weights keep their parts apart, so that tensor parallelism splits a plain axis.

    attn_norm [D]; wqkv [K, G+2, H, D], for each kv head its G query heads, then k, then v; wo [D, N*H];
    ffn_norm [D]; w_gate_up [2, F, D]; w_down [D, F].  Some families have more: qkv_bias [K, G+2, H], and the norms of
    each head of q and k, q_norm and k_norm [H].
    """

    attn_norm: jax.Array
    wqkv: Array
    wo: Array
    ffn_norm: jax.Array
    w_gate_up: Array
    w_down: Array
    qkv_bias: jax.Array | None = None
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """A whole model: embed [V, D], L layers, norm [D], output [V, D] (None when tied: the embedding is used)."""

    embed: Array
    layers: tuple[Layer, ...]
    norm: jax.Array
    output: Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far: k and v are L arrays [B, K, S, H], length int32 [B] counts filled slots.

    Of an int8 cache they are QTensors, with scales [B, K, S].
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    length: jax.Array


def abstract_params(config: ModelConfig, quantize: str | None = None, keep_float: Collection[str] = ()) -> Params:
    """The Params of a config as `jax.ShapeDtypeStruct`s, nothing allocated.

    Norms are float, and so are the matrices without quantize (one of `quantize.SCHEMES`) and those named in keep_float
    (of MATRICES).  With "w8a8", embedding and output are int8 for float activations: a row is looked up in one, and the
    other's result decides the token.  Raises InputError for another scheme or name.
    """
    if quantize not in (None, *SCHEMES):
        raise InputError(f"quantization {quantize!r} is unknown; there are {', '.join(SCHEMES)}")
    matrices = [name for name in MATRICES if name != "output" or not config.tied]
    for name in keep_float:
        if name not in matrices:
            raise InputError(f"{name!r} cannot be kept float; the matrices of this model are {', '.join(matrices)}")
        if quantize is None:
            raise InputError(f"{name!r} is to be kept float, but nothing is quantized; say what to quantize to")

    def norm(width=config.dim):
        return jax.ShapeDtypeStruct((width,), config.dtype)

    def weight(name, *shape):
        scheme = matrix_scheme(name, quantize, keep_float)
        if scheme is None:
            return jax.ShapeDtypeStruct(shape, config.dtype)
        groups = (-(-shape[-1] // GROUP),) if scheme == "int8-g128" else ()
        scale = jax.ShapeDtypeStruct((*shape[:-1], *groups), jnp.float32)
        return QTensor(jax.ShapeDtypeStruct(shape, jnp.int8), scale, int8_inputs=scheme == "w8a8")

    def layer():
        heads = (config.n_kv_heads, config.group + 2, config.head_dim)
        return Layer(
            attn_norm=norm(),
            wqkv=weight("wqkv", *heads, config.dim),
            wo=weight("wo", config.dim, config.n_heads * config.head_dim),
            ffn_norm=norm(),
            w_gate_up=weight("w_gate_up", 2, config.ffn_dim, config.dim),
            w_down=weight("w_down", config.dim, config.ffn_dim),
            qkv_bias=jax.ShapeDtypeStruct(heads, config.dtype) if config.attention_bias else None,
            q_norm=norm(config.head_dim) if config.qk_norm else None,
            k_norm=norm(config.head_dim) if config.qk_norm else None,
        )

    return Params(
        embed=weight("embed", config.vocab_size, config.dim),
        layers=tuple(layer() for _ in range(config.n_layers)),
        norm=norm(),
        output=None if config.tied else weight("output", config.vocab_size, config.dim),
    )


def matrix_scheme(name: str, quantize: str | None, keep_float: Collection[str] = ()) -> str | None:
    """How the parameter of this name (`wqkv`, `norm`, ...) is quantized in a model that is quantized so; None: not."""
    if quantize is None or name in keep_float or name not in MATRICES:
        return None
    return "int8" if quantize == "w8a8" and name in ("embed", "output") else quantize


def quantize_params(params: Params, quantize: str, keep_float: Collection[str] = ()) -> Params:
    """Float Params with their matrices as int8: arguments as in `abstract_params`.

    numpy in, numpy out; jax in, jax out.  Raises ValueError when a matrix is not finite (numpy).
    With "int8", w_down's columns grow at the expense of up's rows first (`quantize.column_gain`).
    """

    def one(path, leaf):
        scheme = matrix_scheme(path[-1].name, quantize, keep_float)
        return quantize_weight(leaf, scheme) if scheme else leaf

    def quantized(layer):
        if not equalizes(quantize, keep_float):
            return jax.tree_util.tree_map_with_path(one, layer)
        gain = column_gain(column_fill(layer.w_down))
        layer = replace(layer, w_down=layer.w_down.astype(np.float32) * gain)
        layer = jax.tree_util.tree_map_with_path(one, layer)
        return replace(layer, w_gate_up=divide_up(layer.w_gate_up, gain))

    layers = tuple(map(quantized, params.layers))
    return replace(jax.tree_util.tree_map_with_path(one, replace(params, layers=())), layers=layers)


def init_params(config: ModelConfig, key) -> Params:
    """Random Params to train from: norms 1, matrices normal with deviation 0.02.

    Those that end a residual branch are smaller by sqrt(2L): Radford et al. 2019, section 2.3.
    """
    shapes, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config))
    arrays = []
    for (path, leaf), subkey in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        name = path[-1].name
        if name == "qkv_bias":
            arrays.append(jnp.zeros(leaf.shape, leaf.dtype))
        elif len(leaf.shape) == 1:
            arrays.append(jnp.ones(leaf.shape, leaf.dtype))
        else:
            deviation = 0.02 / math.sqrt(2 * config.n_layers) if name in ("wo", "w_down") else 0.02
            arrays.append((jax.random.normal(subkey, leaf.shape) * deviation).astype(leaf.dtype))
    return jax.tree_util.tree_unflatten(tree, arrays)


def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty KVCache for `batch` rows of at most `slots` tokens each, as config.dtype and config.kv_cache say."""
    shape = (batch, config.n_kv_heads, slots, config.head_dim)

    def layer():
        if config.kv_cache == "int8":
            return QTensor(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
        return jnp.zeros(shape, config.dtype)

    def layers():  # each its own buffer: the cache is donated, and a buffer can be donated once
        return tuple(layer() for _ in range(config.n_layers))

    return KVCache(layers(), layers(), jnp.zeros(batch, jnp.int32))


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a token for each of the H/2 pairs of a head, float32 [H/2].

    Su et al. 2021, section 3.2.2, and LLaMA 3.1's stretched wavelengths where the config has rope_scaling.
    """
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        # how often a pair turns within the original context decides how much of its own frequency it keeps
        turns = scaling.original_max_len * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    return frequencies.astype(np.float32)


def hidden_states(params: Params, config: ModelConfig, tokens, cache: KVCache | None = None, lengths=None):
    """Run tokens int32 [B, T] through all layers: the normed hidden states [B, T, D] and the cache that now holds them.

    Row b continues at position cache.length[b]; without a cache every row starts at 0 and sees only these tokens.
    lengths int32 [B] says how many of a row's tokens are real (all, by default): those behind are padding, whose
    hidden states mean nothing and which leave the cache alone.  Tokens beyond the cache's last slot are not stored:
    the caller sees to it that there is room.
    """
    x, positions, cos, sin = _embed(params, config, tokens, cache, lengths)
    slots = None if cache is None else (cache.k, cache.v)
    x, keys, values = _blocks(config, x, positions, cos, sin, params.layers, slots)
    x = ops.rms_norm(x, params.norm, config.norm_eps, config.impl)
    if cache is None:
        return x, None
    return x, KVCache(keys, values, cache.length + (tokens.shape[1] if lengths is None else lengths))


def _embed(params, config, tokens, cache, lengths=None):
    """Embeddings x [B, T, D] of tokens [B, T] behind a cache, their positions [B, T], and of these cos and sin.

    Positions of padding are -1.
    """
    batch, count = tokens.shape
    start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
    positions = start[:, None] + jnp.arange(count)
    if lengths is not None:
        positions = jnp.where(jnp.arange(count) < lengths[:, None], positions, -1)
    # float32 throughout: bfloat16 rounds position 257 to 256
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    return ops.embed(tokens, params.embed, config.dtype), positions, jnp.cos(angles), jnp.sin(angles)


def _blocks(config, x, positions, cos, sin, layers, slots=None):
    """x [B, T, D] through all layers, and the k and v of each; slots are those of the cache."""
    keys, values = [], []
    for i, layer in enumerate(layers):
        x, k, v = _block(layer, config, x, positions, cos, sin, slots and (slots[0][i], slots[1][i]))
        keys.append(k)
        values.append(v)
    return x, tuple(keys), tuple(values)


# layers are alike: with a jit of its own, one is traced and lowered for all, and XLA inlines the calls
@partial(jax.jit, static_argnames="config")
def _block(layer, config, x, positions, cos, sin, slots):
    """One layer: x [B, T, D] in, x and this layer's k and v [B, K, S, H] out."""
    matmul = partial(ops.matmul, eps=config.norm_eps, dtype=x.dtype, impl=config.impl)
    qkv = matmul(x, layer.wqkv, norm=layer.attn_norm)  # [B, T, K, G+2, H]
    if layer.qkv_bias is not None:
        qkv = qkv + layer.qkv_bias
    if layer.q_norm is not None:
        q, k, v = jnp.split(qkv, [config.group, config.group + 1], axis=-2)
        q = ops.rms_norm(q, layer.q_norm, config.norm_eps, config.impl)
        k = ops.rms_norm(k, layer.k_norm, config.norm_eps, config.impl)
        qkv = jnp.concatenate([q, k, v], axis=-2)
    if slots is None:
        q = ops.rope(qkv[..., : config.group, :], cos, sin, config.impl)
        k = ops.rope(qkv[..., config.group, :], cos, sin, config.impl).swapaxes(1, 2)
        v = qkv[..., config.group + 1, :].swapaxes(1, 2)
    else:
        q, k, v = ops.rope_store(qkv, cos, sin, positions, *slots, config.impl)
    attended = ops.attention(q, k, v, positions, config.impl, config.sliding_window)
    x = matmul(attended.reshape(*x.shape[:2], -1), layer.wo, residual=x)

    h = matmul(x, layer.w_gate_up, norm=layer.ffn_norm, gated=True)  # [B, T, F]
    return matmul(h, layer.w_down, residual=x), k, v


def logits(params: Params, config: ModelConfig, hidden):
    """Scores float32 [..., V] of the next token, from normed hidden states [..., D]."""
    return ops.matmul(hidden, _output(params), impl=config.impl)


def _output(params):
    return params.embed if params.output is None else params.output


def forward(params: Params, config: ModelConfig, tokens, cache: KVCache | None = None, lengths=None):
    """Logits float32 [B, T, V] for tokens int32 [B, T], and the cache that now holds them (None when none was given).

    A pure function: jit, grad, vmap and shard it.  Arguments as in `hidden_states`.
    """
    if cache is not None and tokens.shape[1] == 1:
        return _decode_step(params, config, tokens, cache, lengths)
    hidden, cache = hidden_states(params, config, tokens, cache, lengths)
    return logits(params, config, hidden), cache


def _decode_step(params, config, tokens, cache, lengths):
    """`forward` of one token of each row, which may be a single kernel."""

    def one_by_one(x, cos, sin, positions, layers, keys, values, norm, output):
        x, keys, values = _blocks(config, x, positions, cos, sin, layers, (keys, values))
        x = ops.rms_norm(x[:, 0], norm, config.norm_eps, config.impl)
        return ops.matmul(x, output, impl=config.impl), keys, values

    # a row that has ended costs less, if there are others
    x, positions, cos, sin = _embed(params, config, tokens, cache, lengths if len(tokens) > 1 else None)
    scores, keys, values = ops.decode_step(
        one_by_one, x, cos, sin, positions, params.layers, cache.k, cache.v, params.norm, _output(params),
        config.norm_eps, config.impl,
        window=config.sliding_window, attention_bias=config.attention_bias, qk_norm=config.qk_norm,
    )  # fmt: skip
    return scores[:, None], KVCache(keys, values, cache.length + (1 if lengths is None else lengths))

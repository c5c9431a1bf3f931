"""The LLaMA forward pass: a pure function of parameters, tokens and a key-value cache.

Touvron et al. 2023: a pre-norm transformer with RMSNorm, rotary positions, SwiGLU and (from LLaMA-2 70B on)
grouped-query attention.  Shapes use the legend of `jaxllm.kernels.reference`, and L for the number of layers.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import ops
from jaxllm.config import ModelConfig
from jaxllm.tensor import Array, QTensor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """One transformer block.  Fused weights keep their parts apart, so that tensor parallelism splits a plain axis.

    attn_norm [D]; wqkv [K, G+2, H, D], for each kv head its G query heads, then k, then v; wo [D, N*H];
    ffn_norm [D]; w_gate_up [2, F, D]; w_down [D, F].
    """

    attn_norm: jax.Array
    wqkv: Array
    wo: Array
    ffn_norm: jax.Array
    w_gate_up: Array
    w_down: Array


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
    """Keys and values of the tokens so far: k and v are L arrays [B, K, S, H], length int32 [B] counts filled slots."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    length: jax.Array


def abstract_params(config: ModelConfig, quantized: bool = False) -> Params:
    """The Params of a config as `jax.ShapeDtypeStruct`s, nothing allocated: norms float, matrices float or int8."""

    def norm():
        return jax.ShapeDtypeStruct((config.dim,), config.dtype)

    def weight(*shape):
        if quantized:
            return QTensor(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(shape[:-1], jnp.float32))
        return jax.ShapeDtypeStruct(shape, config.dtype)

    def layer():
        return Layer(
            attn_norm=norm(),
            wqkv=weight(config.n_kv_heads, config.group + 2, config.head_dim, config.dim),
            wo=weight(config.dim, config.n_heads * config.head_dim),
            ffn_norm=norm(),
            w_gate_up=weight(2, config.ffn_dim, config.dim),
            w_down=weight(config.dim, config.ffn_dim),
        )

    return Params(
        embed=weight(config.vocab_size, config.dim),
        layers=tuple(layer() for _ in range(config.n_layers)),
        norm=norm(),
        output=None if config.tied else weight(config.vocab_size, config.dim),
    )


def init_params(config: ModelConfig, key) -> Params:
    """Random Params to train from: norms 1, matrices normal with deviation 0.02.

    Those that end a residual branch are smaller by sqrt(2L): Radford et al. 2019, section 2.3.
    """
    shapes, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config))
    arrays = []
    for (path, leaf), subkey in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        name = path[-1].name
        if len(leaf.shape) == 1:
            arrays.append(jnp.ones(leaf.shape, leaf.dtype))
        else:
            deviation = 0.02 / math.sqrt(2 * config.n_layers) if name in ("wo", "w_down") else 0.02
            arrays.append((jax.random.normal(subkey, leaf.shape) * deviation).astype(leaf.dtype))
    return jax.tree_util.tree_unflatten(tree, arrays)


def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty KVCache for `batch` rows of at most `slots` tokens each, in config.dtype."""
    shape = (batch, config.n_kv_heads, slots, config.head_dim)

    def layers():  # each its own buffer: the cache is donated, and a buffer can be donated once
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.n_layers))

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
    hidden states mean nothing and whose cache slots stay free.  Tokens beyond the cache's last slot are not stored:
    the caller sees to it that there is room.
    """
    batch, count = tokens.shape
    start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
    positions = start[:, None] + jnp.arange(count)
    # float32 throughout: bfloat16 rounds position 257 to 256
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    x = ops.embed(tokens, params.embed, config.dtype)
    keys, values = [], []
    for i, layer in enumerate(params.layers):
        slots = None if cache is None else (cache.k[i], cache.v[i])
        x, k, v = _block(layer, config, x, positions, cos, sin, slots)
        keys.append(k)
        values.append(v)
    x = ops.rms_norm(x, params.norm, config.norm_eps)
    if cache is None:
        return x, None
    return x, KVCache(tuple(keys), tuple(values), cache.length + (count if lengths is None else lengths))


def _block(layer, config, x, positions, cos, sin, slots):
    """One layer: x [B, T, D] in, x and this layer's k and v [B, K, S, H] out."""
    h = ops.rms_norm(x, layer.attn_norm, config.norm_eps)
    qkv = ops.matmul(h, layer.wqkv).astype(x.dtype)  # [B, T, K, G+2, H]
    q = ops.rope(qkv[..., : config.group, :], cos, sin)
    k = ops.rope(qkv[..., config.group, :], cos, sin)
    v = qkv[..., config.group + 1, :]
    if slots is None:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    else:
        row = jnp.arange(x.shape[0])[:, None]
        # "drop": padding may reach beyond the last slot, where clamping would overwrite a filled one
        k, v = (s.at[row, :, positions].set(new, mode="drop") for s, new in zip(slots, (k, v), strict=True))
        # without the barrier XLA redoes the update inside the attention's loop, and copies the whole cache for that
        k, v = jax.lax.optimization_barrier((k, v))
    attended = ops.attention(q, k, v, positions)
    x = x + ops.matmul(attended.reshape(*x.shape[:2], -1), layer.wo).astype(x.dtype)

    h = ops.rms_norm(x, layer.ffn_norm, config.norm_eps)
    gate_up = ops.matmul(h, layer.w_gate_up).astype(x.dtype)  # [B, T, 2, F]
    h = ops.swiglu(gate_up[..., 0, :], gate_up[..., 1, :])
    return x + ops.matmul(h, layer.w_down).astype(x.dtype), k, v


def logits(params: Params, hidden):
    """Scores float32 [..., V] of the next token, from normed hidden states [..., D]."""
    return ops.matmul(hidden, params.embed if params.output is None else params.output)


def forward(params: Params, config: ModelConfig, tokens, cache: KVCache | None = None, lengths=None):
    """Logits float32 [B, T, V] for tokens int32 [B, T], and the cache that now holds them (None when none was given).

    A pure function: jit, grad, vmap and shard it.  Arguments as in `hidden_states`.
    """
    hidden, cache = hidden_states(params, config, tokens, cache, lengths)
    return logits(params, hidden), cache

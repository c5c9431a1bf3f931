"""Symmetric int8 quantization of weights, one scale an output channel."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.tensor import QTensor

LEVELS = 127  # -128 is left out: the grid is symmetric, and a negated weight quantizes to the negated values
TINY = 1e-37  # the smallest scale; below it weights that matter are denormal numbers, which XLA takes for 0


def quantize(w) -> QTensor:
    """Float weight [*out, in] to int8 values and float32 scales: scale is max|row| / 127, values round half to even.

    numpy in, numpy out (what conversion writes); jax in, jax out, and on a CPU bit for bit the same.  A row of zeros,
    or of weights below 1e-35, has scale 0.  Raises ValueError when a weight is not finite (numpy only).
    """
    xp = jnp if isinstance(w, jax.Array) else np
    w = w.astype(xp.float32)
    peak = xp.max(xp.abs(w), axis=-1)
    if xp is np and not np.isfinite(peak).all():
        raise ValueError("holds a weight that is not finite (NaN or infinite), which int8 cannot hold; keep it float")
    # inverses are spelled out because XLA multiplies by them where a divisor is broadcast, and numpy does not
    scale = peak * xp.float32(1 / LEVELS)
    scale = xp.where(scale >= TINY, scale, xp.float32(0))
    inverse = 1 / xp.where(scale > 0, scale, xp.float32(1))
    values = xp.rint(w * inverse[..., None])
    return QTensor(xp.clip(values, -LEVELS, LEVELS).astype(xp.int8), scale)


def dequantize(w: QTensor, dtype=jnp.float32):
    """The float weight [*out, in] that w stands for."""
    return (w.values.astype(jnp.float32) * w.scale[..., None]).astype(dtype)

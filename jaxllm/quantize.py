"""Symmetric int8 quantization of weights, one scale an output channel."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.tensor import QTensor

LEVELS = 127  # -128 is left out: the grid is symmetric, and a negated weight quantizes to the negated values


def quantize(w) -> QTensor:
    """Float weight [*out, in] to int8 values and float32 scales: scale is max|row| / 127, values round half to even.

    numpy in, numpy out (bit for bit the same on every machine: what conversion writes); jax in, jax out.
    A row of zeros has scale 0.  Raises ValueError when a weight is not finite.
    """
    xp = jnp if isinstance(w, jax.Array) else np
    w = w.astype(xp.float32)
    peak = xp.max(xp.abs(w), axis=-1)
    if xp is np and not np.isfinite(peak).all():
        raise ValueError("holds a weight that is not finite (NaN or infinite), which int8 cannot express")
    scale = peak / xp.float32(LEVELS)
    # a row of zeros, or of numbers so small that peak / 127 is 0: any divisor but 0 will do
    values = xp.rint(w / xp.where(scale > 0, scale, 1)[..., None])
    return QTensor(xp.clip(values, -LEVELS, LEVELS).astype(xp.int8), scale)


def dequantize(w: QTensor, dtype=jnp.float32):
    """The float weight [*out, in] that w stands for."""
    return (w.values.astype(jnp.float32) * w.scale[..., None]).astype(dtype)

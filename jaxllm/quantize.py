"""Symmetric int8 quantization: weights an output channel or a group of 128 inputs, activations a token.

A weight whose activations become int8 too ("w8a8") is rotated first, and so are they: each block of up to 128 inputs is
multiplied by a Hadamard matrix, which leaves the product as it is and spreads the few large activations of a LLaMA over
their block, so that one scale a token suffices.  Ashkboos et al. 2024 (QuaRot), section 4.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.kernels import reference
from jaxllm.kernels.reference import GROUP, LEVELS, TINY
from jaxllm.tensor import QTensor

SCHEMES = ("int8", "int8-g128", "w8a8")
LARGEST_GAIN = 16  # of a column that is next to nothing; float16 activations lose what the gain takes from them
NOT_FINITE = "holds a weight that is not finite (NaN or infinite), which int8 cannot hold; keep it float"


def quantize(w, scheme: str = "int8") -> QTensor:
    """Float weight [*out, in] to int8 values and float32 scales: scale is max|w| / 127, values round half to even.

    The maximum is taken over an output channel, or over each group of 128 inputs with scheme "int8-g128"; with "w8a8"
    the weight is rotated first.  Of activations [..., in] a "channel" is a token.  numpy in, numpy out (what conversion
    writes); jax in, jax out, and on a CPU bit for bit the same where nothing is rotated.  What is all zeros, or below
    1e-35, has scale 0.  Raises InputError for another scheme, and ValueError when a weight is not finite (numpy; in jax
    its scale is not finite then).
    """
    if scheme not in SCHEMES:
        raise InputError(f"quantization {scheme!r} is unknown; there are {', '.join(SCHEMES)}")
    xp = jnp if isinstance(w, jax.Array) else np
    if scheme == "w8a8":
        w = rotate(w)
    w = w.astype(xp.float32)
    size = w.shape[-1]
    if scheme == "int8-g128":
        padding = [(0, 0)] * (w.ndim - 1) + [(0, -size % GROUP)]
        w = xp.pad(w, padding).reshape(*w.shape[:-1], -1, GROUP)
    with np.errstate(invalid="ignore"):  # what is not finite is refused below
        values, scale = reference.quantize_rows(w, xp)
    if xp is np and not np.isfinite(scale).all():
        raise ValueError(NOT_FINITE)
    if scheme == "int8-g128":
        values = values.reshape(*values.shape[:-2], -1)[..., :size]
    return QTensor(values, scale, int8_inputs=scheme == "w8a8")


def equalizes(quantize: str | None, keep_float=()) -> bool:
    """Whether w_down of a model that is quantized so is equalized first, against the rows of up (`column_gain`)."""
    # a group of 128 weights leaves next to no room, and "w8a8" rotates what w_down multiplies
    return quantize == "int8" and not {"w_gate_up", "w_down"} & {*keep_float}


def column_fill(w):
    """The largest share that a weight of each column of w [*out, in] has of its row's maximum: float32 [in].

    That of all rows is the maximum of their blocks'.  numpy in, numpy out; jax in, jax out, on a CPU the same bits.
    """
    xp = jnp if isinstance(w, jax.Array) else np
    sizes = xp.abs(w.reshape(-1, w.shape[-1]).astype(xp.float32))
    peak = xp.max(sizes, axis=-1)
    with np.errstate(invalid="ignore"):  # what is not finite is refused where it is quantized
        return xp.max(sizes * (1 / xp.where(peak > TINY * LEVELS, peak, xp.float32(np.inf)))[:, None], axis=0)


def column_gain(fill):
    """What the columns of w_down [D, F] are multiplied by, 1 to 16, from their `column_fill`: float32 [F].

    Each grows until one of its weights is the largest of a row.  So no row's scale grows, and an error of rounding
    weighs less by the gain, because up's rows, of which each feeds a column, are divided by as much: for an int8 row
    that is its scale.  Nagel et al. 2019, section 4.1, where the other rows' scales are free.
    """
    xp = jnp if isinstance(fill, jax.Array) else np
    fill = xp.where(xp.isfinite(fill), fill, xp.float32(1))
    return 1 / xp.clip(fill, xp.float32(1 / LARGEST_GAIN), xp.float32(1))


def divide_up(w_gate_up: QTensor, gain, start: int = 0) -> QTensor:
    """int8 w_gate_up [2, F, D] with the rows of up over gain [F]; or rows [n, D] of it, from row `start` of 2F on."""
    xp, scale = jnp if isinstance(gain, jax.Array) else np, w_gate_up.scale
    factor = xp.concatenate([xp.ones_like(gain), 1 / gain])[start : start + scale.size].reshape(scale.shape)
    # a scale below TINY would be 0 to XLA
    return replace(w_gate_up, scale=xp.maximum(scale * factor, xp.minimum(scale, xp.float32(TINY))))


def dequantize(w: QTensor, dtype=jnp.float32):
    """The float weight [*out, in] that w stands for; numpy in, numpy out."""
    weight = reference.dequantize(w.values, w.scale, jnp if isinstance(w.values, jax.Array) else np)
    return (rotate(weight) if w.int8_inputs else weight).astype(dtype)


def rotate(x):
    """x [..., in] with each block of inputs times an orthonormal Hadamard matrix: float32 [..., in].

    Blocks have the largest power of two that divides `in`, up to 128.  Its own inverse, and with both sides rotated a
    product x @ w.T stays as it was.  numpy in, numpy out; jax in, jax out.
    """
    size = x.shape[-1]
    block = min(size & -size, GROUP)
    index = np.arange(block)
    # Sylvester's matrix: the sign is the parity of the bits that row and column number share
    parity = np.array([bin(i).count("1") & 1 for i in range(block)])
    signs = 1 - 2 * parity[index[:, None] & index]
    blocks = x.reshape(*x.shape[:-1], size // block, block)
    if isinstance(x, jax.Array):
        spread = reference.einsum("...i,ij->...j", blocks, jnp.asarray(signs, x.dtype))  # +-1 is exact in any type
    else:
        spread = blocks.astype(np.float32) @ signs.astype(np.float32)
    return spread.reshape(x.shape) * np.float32(block**-0.5)

"""The block types of ggml, the quantized numbers in GGUF files, dequantized by compiled programs.

Source: ggml-common.h (the blocks' layouts) and ggml-quants.c (what they mean) of ggml.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.loader import cast

# no type multiplies a float16 scale by more than 128 * 32: below this, all numbers are below float16's 65504
SURE = np.float16(8)
# the innermost axis of bytes: XLA makes vector code of the loops around one as short as this, and with one of 8 to 32
# bytes it unrolls that and does a byte at a time, 3 to 8 times as slow with jax 0.10 (but not behind a look-up)
LANES = 4


def dequantize(blocks: np.ndarray, name: str, dtype: str = "float32") -> np.ndarray:
    """What blocks uint8 [n, size] of ggml's type of this name (of LAYOUTS) hold: [n, numbers] in dtype.

    The float32 numbers are bit for bit those of ggml's own code: all of its products are exact, and so nothing depends
    on whether a compiler contracts one with the difference that follows.  A narrower dtype is rounded from them; where
    one of them does not fit into it, they come as float32.  A scale that is NaN or infinite makes its numbers so.
    """
    layout = LAYOUTS[name]
    scales = blocks[:, layout.scales].view("<u2") & 0x7FFF  # without the signs, in the order of their values
    sure = dtype == "float32" or scales.max() < SURE.view(np.uint16)
    numbers = np.asarray(_dequantize(blocks, name, dtype if sure else "float32")).reshape(len(blocks), -1)
    if not sure:
        with suppress(ValueError):
            return cast(numbers, dtype)
    return numbers


@partial(jax.jit, static_argnames=("name", "dtype"))
def _dequantize(blocks, name, dtype):
    scale, values, offset = LAYOUTS[name].parts(blocks)
    groups = scale.shape[1]
    if groups > 1:
        values = values.reshape(len(blocks), groups, -1, values.shape[-1])

    def wide(x):
        return x.reshape(*x.shape, *[1] * (values.ndim - 2))

    numbers = wide(scale) * values.astype(jnp.float32)
    if offset is not None:
        numbers -= wide(offset)
    return numbers.astype(dtype)


# Pieces of blocks


def _half(blocks, at):
    """The float16 at this byte of each block, as float32 [n, 1]."""
    bits = blocks[:, at].astype(jnp.uint16) | blocks[:, at + 1].astype(jnp.uint16) << 8
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)[:, None]


def _fields(x, bits, groups=1, lanes=LANES):
    """Numbers of so many bits, packed into bytes [n, bytes]: [n, groups, 8 / bits, bytes / groups / lanes, lanes].

    In each group of bytes, the lowest bits of all are the first numbers, the next lowest the numbers after these.
    """
    x = x.reshape(len(x), groups, 1, -1, lanes)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None, None]
    return x >> shifts & (1 << bits) - 1


def _flat_fields(x, bits, groups=1):
    """The same, as [n, numbers]."""
    return _fields(x, bits, groups, lanes=1).reshape(len(x), -1)


def _signed(x):
    return lax.bitcast_convert_type(x, jnp.int8)


def _minus(x, offset):
    return x.astype(jnp.int8) - offset


def _five_bits(blocks, at):
    """32 numbers whose highest bits are in 4 bytes from `at` on, and the other four in 16 behind these."""
    high = blocks[:, at : at + 4].astype(jnp.int32)
    high = (high[:, ::2] | high[:, 1::2] << 8).reshape(-1, 1, 2, 1, 1)
    high = high >> jnp.arange(16).reshape(-1, LANES) & 1
    return _fields(blocks[:, at + 4 :], 4) | high << 4


def _scales_and_minima(blocks):
    """Of Q4_K and Q5_K, the scale and what is subtracted of each group of 32, [n, 8]: two float16 times 6 bits."""
    scale, minimum, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = jnp.concatenate([scale & 63, both & 15 | scale >> 6 << 4], 1)
    minimum = jnp.concatenate([minimum & 63, both >> 4 | minimum >> 6 << 4], 1)
    return _half(blocks, 0) * scale, _half(blocks, 2) * minimum


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def _iq4(x, groups=1):
    """The values that IQ4 has for 4 bits, [n, groups, 2, 1, 16]."""
    index = _fields(x, 4, groups, lanes=16).astype(jnp.int32)
    words = _IQ4.view("<i4")  # shifting a value out of one of four words is faster than a gather
    low, high = jnp.where(index < 4, words[0], words[1]), jnp.where(index < 12, words[2], words[3])
    return jnp.where(index < 8, low, high) << 24 - 8 * (index & 3) >> 24


# The types: blocks uint8 [n, size] -> scale float32 [n, groups], values [n, *], offset as scale or None.
# A number is scale * value - offset, with those of its group; groups are equally long, one behind the other.


def _q4_0(blocks):
    return _half(blocks, 0), _minus(_fields(blocks[:, 2:], 4), 8), None


def _q4_1(blocks):
    return _half(blocks, 0), _fields(blocks[:, 4:], 4), -_half(blocks, 2)


def _q5_0(blocks):
    return _half(blocks, 0), _five_bits(blocks, 2) - 16, None


def _q5_1(blocks):
    return _half(blocks, 0), _five_bits(blocks, 4), -_half(blocks, 2)


def _q8_0(blocks):
    return _half(blocks, 0), _signed(blocks[:, 2:]).reshape(len(blocks), 1, -1, LANES), None


def _q2_k(blocks):
    scales = blocks[:, :16]
    values = _fields(blocks[:, 16:80], 2, groups=2)
    return _half(blocks, 80) * (scales & 15), values, _half(blocks, 82) * (scales >> 4)


def _q3_k(blocks):
    scales = _flat_fields(blocks[:, 96:104], 4) | _flat_fields(blocks[:, 104:108], 2) << 4
    low = _fields(blocks[:, 32:96], 2, groups=2)
    high = _fields(blocks[:, :32], 1).reshape(low.shape)
    return _half(blocks, 108) * _minus(scales, 32), _minus(low | high << 2, 4), None


def _q4_k(blocks):
    scale, minimum = _scales_and_minima(blocks)
    return scale, _fields(blocks[:, 16:], 4, groups=4), minimum


def _q5_k(blocks):
    scale, minimum = _scales_and_minima(blocks)
    low = _fields(blocks[:, 48:], 4, groups=4)
    return scale, low | _fields(blocks[:, 16:48], 1).reshape(low.shape) << 4, minimum


def _q6_k(blocks):
    high = _fields(blocks[:, 128:192], 2, groups=2)
    low = _fields(blocks[:, :128], 4, groups=2).reshape(high.shape)
    return _half(blocks, 208) * _signed(blocks[:, 192:208]), _minus(low | high << 4, 32), None


def _iq4_nl(blocks):
    return _half(blocks, 0), _iq4(blocks[:, 2:]), None


def _iq4_xs(blocks):
    # one byte after the other, and not the low bits of all of them first
    low, high = _flat_fields(blocks[:, 4:8], 4, groups=4), _flat_fields(blocks[:, 2:4], 2, groups=2)
    return _half(blocks, 0) * _minus(low | high << 4, 32), _iq4(blocks[:, 8:], groups=8), None


@dataclass(frozen=True)
class Layout:
    """Where a block has its float16 scales, all side by side, and what it is made of."""

    scales: slice
    parts: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array | None]]


LAYOUTS = {
    "Q4_0": Layout(slice(0, 2), _q4_0),
    "Q4_1": Layout(slice(0, 4), _q4_1),
    "Q5_0": Layout(slice(0, 2), _q5_0),
    "Q5_1": Layout(slice(0, 4), _q5_1),
    "Q8_0": Layout(slice(0, 2), _q8_0),
    "Q2_K": Layout(slice(80, 84), _q2_k),
    "Q3_K": Layout(slice(108, 110), _q3_k),
    "Q4_K": Layout(slice(0, 4), _q4_k),
    "Q5_K": Layout(slice(0, 4), _q5_k),
    "Q6_K": Layout(slice(208, 210), _q6_k),
    "IQ4_NL": Layout(slice(0, 2), _iq4_nl),
    "IQ4_XS": Layout(slice(0, 2), _iq4_xs),
}

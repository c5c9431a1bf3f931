"""Every op in plain jax.numpy: the specification, the path on CPUs, and the differentiable path.

Shapes use one legend: B batch, T new tokens, S cache slots, N query heads, K kv heads, G = N // K, H head dim,
D model width, F ffn width, V vocabulary.  Sums are taken in float32 whatever the type of the arguments.
"""

import jax
import jax.numpy as jnp

# XLA's default lets a GPU multiply float32 in tf32, which keeps 10 bits of the mantissa
EXACT = jax.lax.Precision.HIGHEST
FEW_ROWS = 8  # up to here a product with a weight is bound by reading the weight, not by arithmetic


def rms_norm(x, weight, eps):
    """x [..., D] over its root mean square, times weight [D]; in x's type.  Zhang and Sennrich 2019, eq. 4."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * weight.astype(jnp.float32)).astype(x.dtype)


def matmul(x, w):
    """x [..., in] times w [*out, in] transposed: float32 [..., *out]."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW_ROWS:
        # seen as a matrix: of a w with several output axes XLA would make a transposed copy
        matrix = w.reshape(-1, w.shape[-1]).astype(x.dtype)
        out = jnp.einsum("ri,oi->ro", rows, matrix, precision=EXACT, preferred_element_type=jnp.float32)
    elif len(rows) == 1:
        out = _multiply_sum(rows[0], w)  # without a row axis: with one of size 1, XLA's loop on CPUs is 80 times slower
    else:
        out = jax.vmap(_multiply_sum, in_axes=(0, None))(rows, w)
    return out.reshape(*x.shape[:-1], *w.shape[:-1])


def _multiply_sum(x, w):
    """x [in] times w [*out, in] transposed, as a multiply and a sum: one loop that converts narrow weights on the way.

    As a dot product XLA would write a converted copy of w first: on a CPU, 8 times slower for an int8 w.
    """
    return jnp.sum(w.astype(jnp.float32) * x.astype(jnp.float32), axis=-1)


def int8_matmul(x, values, scale):
    """x [..., in] times int8 values [*out, in] transposed, times scale [*out]: float32 [..., *out].

    The scale is one number an output channel, so it is applied to the sum and not to every weight.
    """
    # ties the weight to x: in a decode loop XLA would else convert all weights once, before the loop, and keep them
    x, values = jax.lax.optimization_barrier((x, values))
    return matmul(x, values) * scale


def rope(x, cos, sin):
    """Rotate each pair (i, i + H/2) of x [B, T, ..., H] by the angle whose cos and sin [B, T, H/2] are given; in x's type.

    Su et al. 2021, eq. 34, with the two halves of a pair H/2 apart instead of adjacent.
    """
    between = (1,) * (x.ndim - 3)
    cos, sin = (a.reshape(*a.shape[:2], *between, a.shape[-1]) for a in (cos, sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(q, k, v, positions):
    """Attention of q [B, T, K, G, H] over k and v [B, K, S, H], in q's type.

    The query at positions [B, T] sees the slots 0 to its own position and no later one, so slots that are not filled
    yet have no weight.  Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 for the groups.
    """
    # k before q, so that XLA reads k and v where they lie; the other way round it transposes k, and jax 0.10 copies it
    scores = jnp.einsum("BKSH,BTKGH->BKSGT", k, q, precision=EXACT, preferred_element_type=jnp.float32)
    visible = jnp.arange(k.shape[2])[:, None, None] <= positions[:, None, None, None, :]
    weights = jax.nn.softmax(jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf), axis=2).astype(q.dtype)
    out = jnp.einsum("BKSGT,BKSH->BTKGH", weights, v, precision=EXACT, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def swiglu(gate, up):
    """silu(gate) * up, elementwise; in gate's type.  Shazeer 2020, eq. 6."""
    gate32 = gate.astype(jnp.float32)
    return (gate32 * jax.nn.sigmoid(gate32) * up.astype(jnp.float32)).astype(gate.dtype)

"""Every op in plain jax.numpy: the specification, the path on CPUs, and the differentiable path.

Shapes use one legend: B batch, T new tokens, S cache slots, N query heads, K kv heads, G = N // K, H head dim,
D model width, F ffn width, V vocabulary.  Sums are taken in float32 whatever the type of the arguments.
"""

import jax
import jax.numpy as jnp

# XLA's default lets a GPU multiply float32 in tf32, which keeps 10 bits of the mantissa
EXACT = jax.lax.Precision.HIGHEST
GROUP = 128  # inputs that share a scale, where a weight's scales are not one an output channel
LEVELS = 127  # -128 is left out: the grid is symmetric, and a negated weight quantizes to the negated values
TINY = 1e-37  # the smallest scale; below it weights that matter are denormal numbers, which XLA takes for 0
FEW_ROWS = 8  # up to here a CPU takes longer to convert a weight than to multiply by it
MANY_ROWS = 512  # above, a GPU is faster when it converts a weight first and leaves the product to cuBLAS


def einsum(spec, a, b, dtype=jnp.float32):
    """The einsum of a and b, of one type, with products and sums in float32; the result in dtype."""

    def multiply(a, b, dtype=dtype):
        return jnp.einsum(spec, a, b, precision=EXACT, preferred_element_type=dtype)

    if a.dtype == jnp.float32:
        return multiply(a, b, jnp.float32).astype(dtype)
    # XLA's CPU backend has no product of bfloat16 that sums in float32; on GPUs that is what tensor cores do
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: multiply(a.astype(jnp.float32), b.astype(jnp.float32), jnp.float32).astype(dtype),
        default=multiply,
    )


def rms_norm(x, weight, eps):
    """x [..., D] over its root mean square, times weight [D]; in x's type.  Zhang and Sennrich 2019, eq. 4."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * weight.astype(jnp.float32)).astype(x.dtype)


def add_rms_norm(x, delta, weight, eps):
    """x + delta [..., D] in x's type, and the rms_norm of that sum."""
    x = x + delta.astype(x.dtype)
    return x, rms_norm(x, weight, eps)


def softmax(x):
    """exp(x) over its sum along the last axis of x [..., n]; in x's type."""
    return jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(x.dtype)


def matmul(x, w, norm=None, residual=None, eps=0.0, gated=False, dtype=jnp.float32):
    """x [..., in] times w [*out, in] transposed: [..., *out] in dtype.

    With norm [in], rms_norm(x, norm, eps) takes the place of x.  With gated, w is [2, F, in] and what is returned is
    swiglu of the product, [..., F].  residual [..., *out] is added at last.
    """
    return _finish(_product(_normed(x, norm, eps), w, dtype), residual, gated, dtype)


def _normed(x, norm, eps):
    return x if norm is None else rms_norm(x, norm, eps)


def _finish(product, residual, gated, dtype):
    product = product.astype(dtype)
    if gated:
        product = swiglu(product)
    return product if residual is None else residual.astype(dtype) + product


def _product(x, w, dtype=jnp.float32):
    """x [..., in] times w [*out, in] transposed: [..., *out] in dtype, or in float32 for few rows."""
    rows = x.reshape(-1, x.shape[-1])
    # seen as a matrix: of a w with several output axes XLA would make a transposed copy
    matrix = w.reshape(-1, w.shape[-1])
    if len(rows) == 1:
        # without a row axis: with one of size 1, XLA's loop on CPUs is 80 times slower
        out = _multiply_sum(rows[0], matrix)
    elif len(rows) <= FEW_ROWS:
        out = jax.lax.platform_dependent(rows, matrix, cpu=jax.vmap(_multiply_sum, in_axes=(0, None)), default=_dot)
    else:
        out = _dot(rows, matrix, dtype)
    return out.reshape(*x.shape[:-1], *w.shape[:-1])


def _dot(rows, matrix, dtype=jnp.float32):
    return einsum("ri,oi->ro", rows, matrix.astype(rows.dtype), dtype)


def _multiply_sum(row, matrix):
    """row [in] times matrix [out, in] transposed, as a multiply and a sum: one loop that converts weights on the way.

    For a dot product XLA writes a converted copy of the matrix first (CPU), or takes a kernel made for many rows (GPU).
    """
    return jnp.sum(matrix.astype(jnp.float32) * row.astype(jnp.float32), axis=-1)


def int8_matmul(x, values, scale, norm=None, residual=None, eps=0.0, gated=False, dtype=jnp.float32):
    """matmul of x [..., in] and the int8 weight of values [*out, in] and scale; the other arguments are as there.

    scale [*out] is one number an output channel, and applied to the sum instead of to every weight; of groups, scale is
    [*out, groups] as in `dequantize`.
    """
    x = _normed(x, norm, eps)
    # ties the weight to x: in a decode loop XLA would else convert all weights once, before the loop, and keep them
    x, values = jax.lax.optimization_barrier((x, values))
    grouped, sums = scale.ndim == values.ndim, jnp.float32
    weights = dequantize(values, scale) if grouped else values
    if x.size > MANY_ROWS * x.shape[-1]:
        weights = jax.lax.optimization_barrier(weights.astype(x.dtype))
        if x.dtype == dtype == jnp.bfloat16:
            sums = dtype  # half the bytes of float32; a number that its scale is still missing of fits there too
    product = _product(x, weights, sums)
    return _finish(product if grouped else product * scale, residual, gated, dtype)


def dequantize(values, scale, xp=jnp):
    """The weight float32 [*out, in] of int8 values [*out, in] and scale: [*out], or [*out, groups] of 128 inputs.

    xp is jax.numpy, or numpy.
    """
    if scale.ndim < values.ndim:
        scale = scale[..., None]
    else:
        scale = xp.repeat(scale, GROUP, axis=-1)[..., : values.shape[-1]]  # the last group may be short
    return values.astype(xp.float32) * scale


def quantize_rows(x, xp=jnp):
    """x [..., n] as symmetric int8: values [..., n], and scale [...] = max|x| / 127 of each row; float32 inside.

    Values round half to even.  A row of zeros, or below TINY, has scale 0.  xp is jax.numpy, or numpy: on a CPU both
    give the same bits.
    """
    x = x.astype(xp.float32)
    # inverses are spelled out because XLA multiplies by them where a divisor is broadcast, and numpy does not
    scale = xp.max(xp.abs(x), axis=-1) * xp.float32(1 / LEVELS)
    scale = xp.where(scale < TINY, xp.float32(0), scale)
    inverse = 1 / xp.where(scale > 0, scale, xp.float32(1))
    return xp.clip(xp.rint(x * inverse[..., None]), -LEVELS, LEVELS).astype(xp.int8), scale


def w8a8_matmul(x, x_scale, values, scale, residual=None, gated=False, dtype=jnp.float32):
    """int8 x [..., in] times int8 values [*out, in] transposed, summed in int32, times x_scale [...] and scale [*out].

    [..., *out] in dtype; residual and gated as in `matmul`.
    """
    rows, matrix = x.reshape(-1, x.shape[-1]), values.reshape(-1, values.shape[-1])

    def dot(rows, matrix):
        return jnp.einsum("ri,oi->ro", rows, matrix, preferred_element_type=jnp.int32)

    def dot_of_two(rows, matrix):
        return dot(jnp.pad(rows, [(0, 1), (0, 0)]), matrix)[:1]

    def multiply_sum(row, matrix):
        return jnp.sum(matrix.astype(jnp.int32) * row.astype(jnp.int32), axis=-1)

    if len(rows) == 1:
        # a CPU has instructions for int8 products, but XLA takes them from two rows on
        out = jax.lax.platform_dependent(
            rows, matrix, cpu=dot_of_two, default=lambda rows, matrix: multiply_sum(rows[0], matrix)[None]
        )
    elif x.shape[-1] % 4:
        # on a GPU, XLA's int8 dot over 35 inputs gives twice the sum (jax 0.11.2, H100)
        out = jax.lax.platform_dependent(rows, matrix, cpu=dot, default=jax.vmap(multiply_sum, in_axes=(0, None)))
    else:
        out = dot(rows, matrix)
    out = out.reshape(*x.shape[:-1], *values.shape[:-1])
    product = out * x_scale.reshape(*x_scale.shape, *(1,) * scale.ndim) * scale
    return _finish(product, residual, gated, dtype)


def rope(x, cos, sin):
    """Rotate each pair (i, i + H/2) of x [B, T, ..., H] by an angle, given as cos and sin [B, T, H/2]; in x's type.

    Su et al. 2021, eq. 34, with the two halves of a pair H/2 apart instead of adjacent.
    """
    between = (1,) * (x.ndim - 3)
    cos, sin = (a.reshape(*a.shape[:2], *between, a.shape[-1]) for a in (cos, sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rope_store(qkv, cos, sin, positions, k, v, k_scale=None, v_scale=None):
    """Rotate q and k of qkv [B, T, K, G+2, H], and write k and v into a cache: q [B, T, K, G, H], and the cache.

    qkv holds for each kv head its G query heads, then k, then v; cos and sin are as in `rope`.  The cache k and v
    [B, K, S, H] has qkv's type, or is int8 with k_scale and v_scale [B, K, S]; it is returned as it was given.  Token t
    of row b goes to slot positions[b, t]; one beyond the last slot, or below 0, is dropped.
    """
    q, new_k, new_v = rope(qkv[..., :-2, :], cos, sin), rope(qkv[..., -2, :], cos, sin), qkv[..., -1, :]
    if k_scale is None:
        cache, new = (k, v), (new_k, new_v)
    else:
        (k8, k8_scale), (v8, v8_scale) = quantize_rows(new_k), quantize_rows(new_v)
        cache, new = (k, v, k_scale, v_scale), (k8, v8, k8_scale, v8_scale)
    row = jnp.arange(qkv.shape[0])[:, None]
    positions = jnp.where(positions < 0, k.shape[2], positions)  # jax counts negative ones from the end
    cache = jax.tree.map(lambda s, a: s.at[row, :, positions].set(a, mode="drop"), cache, new)
    # without the barrier XLA redoes the update inside the attention's loop, and copies the whole cache for that
    return q, *jax.lax.optimization_barrier(cache)


def attention(q, k, v, positions, k_scale=None, v_scale=None, window=None):
    """Attention of q [B, T, K, G, H] over k and v [B, K, S, H], in q's type.

    k and v are of q's type, or int8 with k_scale and v_scale [B, K, S], one number a slot and head.
    The query at positions [B, T] sees the slots 0 to its own position and no later one, so slots that are not filled
    yet have no weight; with a window it sees the last so many of these only.  One below position 0 sees slot 0.
    Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 for the groups, Beltagy et al. 2020 for the window.
    """
    # k before q, so that XLA reads k and v where they lie; the other way round it transposes k, and jax 0.10 copies it
    scores = einsum("BKSH,BTKGH->BKSGT", k.astype(q.dtype), q)
    if k_scale is not None:
        scores = scores * k_scale[..., None, None]
    slots, last = jnp.arange(k.shape[2])[:, None, None], jnp.maximum(positions, 0)[:, None, None, None, :]
    visible = slots <= last if window is None else (slots <= last) & (slots > last - window)
    weights = jax.nn.softmax(jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf), axis=2)
    if v_scale is not None:
        weights = weights * v_scale[..., None, None]
    return einsum("BKSGT,BKSH->BTKGH", weights.astype(q.dtype), v.astype(q.dtype)).astype(q.dtype)


def swiglu(gate_up):
    """silu(gate) * up, elementwise, of gate_up [..., 2, F]: [..., F] in its type.  Shazeer 2020, eq. 6."""
    gate, up = gate_up[..., 0, :].astype(jnp.float32), gate_up[..., 1, :].astype(jnp.float32)
    return (gate * jax.nn.sigmoid(gate) * up).astype(gate_up.dtype)


def restrict(logits, top_k, top_p):
    """Logits float32 [B, V] with those outside top-k and top-p at -inf; top_k int32 [B], 0 is off; top_p float32 [B].

    A token is within top-p while the probability of all likelier ones, among those within top-k, is below top_p
    (Holtzman et al. 2020); with 1 or more all are.  What ties with the last one stays.
    """
    size = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(size)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)[:, None]
    in_k = rank < k
    p = jax.nn.softmax(jnp.where(in_k, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # the probability of all likelier tokens
    top_p = top_p[:, None]
    in_p = (before < top_p) | (top_p >= 1)  # a sum of float32 may reach 1 before the last token
    last = jnp.sum(in_k & in_p, axis=-1, keepdims=True) - 1
    threshold = jnp.take_along_axis(descending, last, axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)

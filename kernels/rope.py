"""Rotary position embedding as Triton kernels: alone, and in one pass with the update of the key-value cache."""

import jax
import triton
import triton.language as tl

from jaxllm.kernels import reference
from jaxllm.kernels.launch import launch

TINY = tl.constexpr(reference.TINY)
TILE = 4096  # elements of q that a program rotates, at most


@triton.jit
def _rotate(x, inside, cos, sin, HALF: tl.constexpr):
    """Both halves, in float32, of the heads at pointers x to their first halves."""
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _quantize(first, second, scale, at, stored):
    """int8 values of heads, given as two float32 halves; their scales are stored."""
    # as integers, floats above 0 keep their order and NaN is the largest: tl.max itself would drop it
    bits = tl.maximum(tl.abs(first).to(tl.int32, bitcast=True), tl.abs(second).to(tl.int32, bitcast=True))
    step = tl.max(bits, 1).to(tl.float32, bitcast=True) * (1 / 127)
    step = tl.where(step < TINY, 0.0, step)
    tl.store(scale + at, step, mask=stored)
    inverse = tl.div_rn(1.0, tl.where(step > 0, step, 1.0))[:, None]
    return _round(first * inverse), _round(second * inverse)


@triton.jit
def _round(x):
    """To int8, half to even, within +-127."""
    # 1.5 * 2**23 leaves no bits for a fraction, and the last byte of the sum is the integer.  The limits come first:
    # between product and sum they keep the two from being fused, which would round once instead of twice
    x = tl.minimum(tl.maximum(x, -127.0), 127.0) + 12582912.0
    return x.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _rope_store(
    qkv, cos, sin, positions, k, v, k_scale, v_scale, q,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = 2 * HALF
    head = tl.program_id(0)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    b = tl.program_id(2).to(tl.int64)
    token = b * T + t
    place = token * K + head  # among the kv heads of all tokens
    at = tl.arange(0, WIDTH)
    inside = (t < T)[:, None] & (at < HALF)[None, :]
    c = tl.load(cos + token[:, None] * HALF + at[None, :], mask=inside, other=0.0)
    s = tl.load(sin + token[:, None] * HALF + at[None, :], mask=inside, other=0.0)
    slot = tl.load(positions + token, mask=t < T, other=S)
    source = qkv + (place * ((G + 2) * H))[:, None] + at[None, :]

    # k and v first: a scale takes a reduction, which q need not wait for
    first, second = _rotate(source + G * H, inside, c, s, HALF)
    v_first = tl.load(source + (G + 1) * H, mask=inside, other=0.0)
    v_second = tl.load(source + (G + 1) * H + HALF, mask=inside, other=0.0)
    stored = (slot >= 0) & (slot < S)
    where = (b * K + head) * S + slot
    target = where[:, None] * H + at[None, :]
    written = stored[:, None] & (at < HALF)[None, :]
    kind = qkv.dtype.element_ty
    first = first.to(kind)
    second = second.to(kind)
    if SCALED:
        first, second = _quantize(first.to(tl.float32), second.to(tl.float32), k_scale, where, stored)
        v_first, v_second = _quantize(v_first.to(tl.float32), v_second.to(tl.float32), v_scale, where, stored)
    tl.store(k + target, first, mask=written)
    tl.store(k + target + HALF, second, mask=written)
    tl.store(v + target, v_first, mask=written)
    tl.store(v + target + HALF, v_second, mask=written)

    g = tl.arange(0, HEADS)[None, :, None]
    inside = inside[:, None, :] & (g < G)
    first, second = _rotate(source[:, None, :] + g * H, inside, c[:, None, :], s[:, None, :], HALF)
    target = q + (place * (G * H))[:, None, None] + g * H + at[None, None, :]
    tl.store(target, first.to(kind), mask=inside)
    tl.store(target + HALF, second.to(kind), mask=inside)


def rope_store(qkv, cos, sin, positions, k, v, k_scale=None, v_scale=None):
    """Rotate q and k of qkv [B, T, K, G+2, H], and store k and v in slots positions int32 [B, T] of the cache.

    qkv has, for each kv head, its G query heads, then k, then v; angles are given as in `rope`.  The cache k and v
    [B, K, S, H] is of qkv's type, or int8 with k_scale and v_scale float32 [B, K, S], one number a slot and head, as
    `jaxllm.quantize` quantizes a token; positions below 0, and of S and above, are dropped.  The result is
    q [B, T, K, G, H] and the cache in place: (q, k, v), or (q, k, v, k_scale, v_scale).
    """
    B, T, K, parts, H = qkv.shape
    group = parts - 2
    width, heads = triton.next_power_of_2(H // 2), triton.next_power_of_2(group)
    tokens = min(triton.next_power_of_2(T), max(1, TILE // (2 * width * heads)))
    cache = (k, v) if k_scale is None else (k, v, k_scale, v_scale)
    unused = (positions, positions) if k_scale is None else ()
    out = [jax.ShapeDtypeStruct((B, T, K, group, H), qkv.dtype)]
    return launch(
        _rope_store,
        qkv,
        cos,
        sin,
        positions,
        *cache,
        *unused,
        out=(*out, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in cache)),
        grid=(K, triton.cdiv(T, tokens), B),
        aliases={4 + number: 1 + number for number in range(len(cache))},
        num_warps=max(1, min(4, tokens * heads * width // 256)),
        T=T,
        S=k.shape[2],
        K=K,
        G=group,
        HALF=H // 2,
        TOKENS=tokens,
        HEADS=heads,
        WIDTH=width,
        SCALED=k_scale is not None,
    )


@triton.jit
def _rope(
    x, cos, sin, out,
    TOKENS: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // N
    at = tl.arange(0, WIDTH)[None, :]
    inside = (token < TOKENS)[:, None] & (at < HALF)
    c = tl.load(cos + token[:, None] * HALF + at, mask=inside, other=0.0)
    s = tl.load(sin + token[:, None] * HALF + at, mask=inside, other=0.0)
    place = row[:, None] * (2 * HALF) + at
    first, second = _rotate(x + place, inside, c, s, HALF)
    tl.store(out + place, first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + HALF, second.to(out.dtype.element_ty), mask=inside)


def rope(x, cos, sin):
    """As `reference.rope`: each pair (i, i + H/2) of x [B, T, ..., H] rotated, by cos and sin float32 [B, T, H/2]."""
    H = x.shape[-1]
    count = x.size // H
    tokens = x.shape[0] * x.shape[1]
    width = triton.next_power_of_2(H // 2)
    rows = min(triton.next_power_of_2(count), max(1, TILE // (2 * width)))
    return launch(
        _rope,
        x,
        cos,
        sin,
        out=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(triton.cdiv(count, rows),),
        num_warps=max(1, min(4, rows * width // 256)),
        TOKENS=tokens,
        N=count // tokens,
        HALF=H // 2,
        ROWS=rows,
        WIDTH=width,
    )

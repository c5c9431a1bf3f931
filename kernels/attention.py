"""Attention over a key-value cache as Triton kernels: for prefill, for one token, and for anything between.

FlashAttention (Dao et al. 2022; Dao 2023) with the G query heads of a kv head in one block of rows, so that k and v are
read once for all of them; where that makes fewer programs than a GPU can run, the slots are split too, and a second
kernel combines the parts (Flash-Decoding, Dao et al. 2023).
"""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxllm.kernels.launch import launch

FEW_ROWS = 128  # up to here reading k and v takes the time, and slots are split; above, multiplying does
PROGRAMS = 264  # that run at once: 2 on each of an H100's 132 multiprocessors


@triton.jit
def _visit(
    begin, end, queries, position, peak, total, sums, k, v, k_scale, v_scale, scale,
    H: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the slots from begin to end to each row's maximum, sum of weights, and weighted sum of v."""
    at = tl.arange(0, WIDTH)
    for start in range(begin, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        offset = slot[:, None] * H + at[None, :]
        # free slots hold anything: a v there would count even with weight 0, if it is NaN
        filled = slot < end
        inside = at[None, :] < H
        if MASKED:
            inside = inside & filled[:, None]
        keys = tl.load(k + offset, mask=inside, other=0).to(queries.dtype)
        # of float32: three products of tf32, which together keep 21 bits; for the smaller types it means nothing
        scores = tl.dot(queries, tl.trans(keys), input_precision="tf32x3")
        if SCALED:
            scores = scores * tl.load(k_scale + slot, mask=filled, other=0)[None, :]
        if MASKED:
            scores = tl.where(slot[None, :] <= position[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        # a row that has seen no slot yet has maximum -inf, and -inf - -inf is NaN
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * scale - shift[:, None])
        fade = tl.exp2(peak - shift)
        peak = higher
        total = total * fade + tl.sum(weights, 1)
        if SCALED:
            weights = weights * tl.load(v_scale + slot, mask=filled, other=0)[None, :]
        values = tl.load(v + offset, mask=inside, other=0).to(queries.dtype)
        sums = tl.dot(weights.to(queries.dtype), values, sums * fade[:, None], input_precision="tf32x3")
    return peak, total, sums


@triton.jit
def _attend(
    q, k, v, positions, k_scale, v_scale, out, scale,
    B: tl.constexpr, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr,
    ALL_MASKED: tl.constexpr,
):  # fmt: skip
    """Rows are T*G queries of one kv head; out is q's shape, or with SPLITS the partial sums, maxima and totals."""
    head = tl.program_id(0)
    # the last queries see the most slots: they go first, so that no long program starts late
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    token = head // K * T + tl.minimum(row // G, T - 1)  # rows beyond the last repeat it, and are not stored
    place = (token.to(tl.int64) * K + head % K) * G + row % G  # among the queries of all heads
    at = tl.arange(0, WIDTH)
    queries = tl.load(q + place[:, None] * H + at[None, :], mask=at[None, :] < H, other=0)
    position = tl.minimum(tl.load(positions + token), S - 1)

    begin = 0
    end = tl.max(position) + 1
    if SPLITS > 1:
        # splits share what is filled, not what is allocated
        share = tl.cdiv(tl.cdiv(end, SPLITS), SLOTS) * SLOTS
        begin = split * share
        end = tl.minimum(end, begin + share)
    first = head.to(tl.int64) * S
    k += first * H
    v += first * H
    k_scale += first
    v_scale += first
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    if not ALL_MASKED:
        shared = tl.minimum((tl.min(position) + 1) // SLOTS * SLOTS, end)  # every row sees the slots before this one
        peak, total, sums = _visit(
            begin, shared, queries, position, peak, total, sums, k, v, k_scale, v_scale, scale,
            H, WIDTH, SLOTS, SCALED, False,
        )  # fmt: skip
        begin = tl.maximum(begin, shared)
    peak, total, sums = _visit(
        begin, end, queries, position, peak, total, sums, k, v, k_scale, v_scale, scale,
        H, WIDTH, SLOTS, SCALED, True,
    )  # fmt: skip

    exists = row < T * G
    inside = exists[:, None] & (at[None, :] < H)
    if SPLITS == 1:
        tl.store(
            out + place[:, None] * H + at[None, :], (sums * (1 / total)[:, None]).to(out.dtype.element_ty), mask=inside
        )
    else:
        count: tl.constexpr = B * T * K * G
        place += split.to(tl.int64) * count
        tl.store(out + place[:, None] * H + at[None, :], sums, mask=inside & (begin < end))
        tl.store(out + SPLITS * count * H + place, peak, mask=exists)
        tl.store(out + SPLITS * count * (H + 1) + place, total, mask=exists)


@triton.jit
def _combine(parts, out, H: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr):
    """One query: its weighted sums over each split, made one."""
    count = tl.num_programs(0)
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, MOST)
    at = tl.arange(0, WIDTH)
    place = row + split.to(tl.int64) * count
    peaks = parts + SPLITS * count.to(tl.int64) * H
    peak = tl.load(peaks + place, mask=split < SPLITS, other=float("-inf"))
    total = tl.load(peaks + SPLITS * count + place, mask=split < SPLITS, other=0.0)
    # a split without a slot has maximum -inf, and its sums were not written
    inside = (peak > float("-inf"))[:, None] & (at[None, :] < H)
    sums = tl.load(parts + place[:, None] * H + at[None, :], mask=inside, other=0.0)
    weight = tl.exp2(peak - tl.max(peak))
    result = tl.sum(weight[:, None] * sums, 0) / tl.sum(weight * total)
    tl.store(out + row * H + at, result.to(out.dtype.element_ty), mask=at < H)


def blocks(rows: int, q_type, kv_type) -> dict:
    """Block sizes, warps and stages for that many rows (T*G) of a kv head: what fits in the registers of every GPU."""
    few = min(max(16, triton.next_power_of_2(rows)), 64)  # tensor cores multiply 16 rows at least
    if q_type == jnp.float32:
        return dict(ROWS=min(few, 32), SLOTS=32, num_warps=8, num_stages=2)
    if rows <= FEW_ROWS:
        return dict(ROWS=few, SLOTS=64, num_warps=4 if few == 16 else 8, num_stages=3)
    # int8 is converted in registers
    return dict(ROWS=128, SLOTS=64 if kv_type == q_type else 32, num_warps=8, num_stages=2)


def attention(q, k, v, positions, k_scale=None, v_scale=None):
    """Attention of q [B, T, K, G, H], at positions int32 [B, T], over k and v [B, K, S, H], in q's type.

    As `reference.attention`: k and v are of q's type, or int8 with k_scale and v_scale float32 [B, K, S].  What lies
    in slots behind the largest position of a row of the batch has no influence, even if it is not finite.
    """
    B, T, K, G, H = q.shape
    S = k.shape[2]
    width = max(16, triton.next_power_of_2(H))
    block = blocks(T * G, q.dtype, k.dtype)
    few = T * G <= FEW_ROWS
    programs = B * K * triton.cdiv(T * G, block["ROWS"])
    splits = max(1, min(PROGRAMS // programs, triton.cdiv(S, block["SLOTS"]))) if few else 1
    count = B * T * K * G
    result = jax.ShapeDtypeStruct(q.shape, q.dtype)
    parts = jax.ShapeDtypeStruct((splits * count * (H + 2),), jnp.float32)
    scales = (positions, positions) if k_scale is None else (k_scale, v_scale)  # not used without scales
    out = launch(
        _attend,
        q,
        k,
        v,
        positions,
        *scales,
        out=result if splits == 1 else parts,
        grid=(B * K, triton.cdiv(T * G, block["ROWS"]), splits),
        scale=H**-0.5 * math.log2(math.e),
        B=B,
        T=T,
        S=S,
        K=K,
        G=G,
        H=H,
        WIDTH=width,
        SPLITS=splits,
        SCALED=k_scale is not None,
        ALL_MASKED=few,
        **block,
    )
    if splits == 1:
        return out
    most = triton.next_power_of_2(splits)
    return launch(
        _combine,
        out,
        out=result,
        grid=(count,),
        num_warps=max(1, min(8, most * width // 2048)),
        H=H,
        WIDTH=width,
        SPLITS=splits,
        MOST=most,
    )

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

from jaxllm.kernels.launch import launch, shared_memory
from jaxllm.kernels.matmul import signed_byte

FEW_ROWS = 128  # up to here reading k and v takes the time, and slots are split; above, multiplying does
# of the kernel for one query: programs that there should be, 4 for each of an H100's 132 multiprocessors; warps of
# each; how many slots a thread loads 16 bytes of at a time
ONE_QUERY_PROGRAMS, WARPS, DEEP = 528, 4, 4


@triton.jit
def _numbers(words, zero, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """float32 [rows, WIDTH] of words [rows, ...] of numbers; of int8, the odd ones times 256."""
    if dtype == tl.int8:
        even = tl.join(signed_byte(words, zero, 0), signed_byte(words >> 16, zero, 0))
        odd = tl.join(signed_byte(words, zero, 1), signed_byte(words >> 16, zero, 1))
        numbers = tl.join(even, odd)
    elif dtype == tl.float32:
        numbers = words.to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(dtype, bitcast=True)
        numbers = tl.join(low, (words >> 16).to(tl.int16).to(dtype, bitcast=True)).to(tl.float32)
    return numbers.reshape(words.shape[0], WIDTH)


@triton.jit
def _load_slots(k, v, k_scale, v_scale, offset, slot, inside, filled, SCALED: tl.constexpr):
    keys = tl.load(k + offset, mask=inside, other=0)
    values = tl.load(v + offset, mask=inside, other=0)
    key_scale = 1.0
    value_scale = 1.0
    if SCALED:
        key_scale = tl.load(k_scale + slot, mask=filled, other=0)
        value_scale = tl.load(v_scale + slot, mask=filled, other=0)
    return keys, values, key_scale, value_scale


@triton.jit
def _attend_one(
    q, k, v, positions, k_scale, v_scale, out, scale,
    B: tl.constexpr, S: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    DEEP: tl.constexpr, TALL: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """`_attend` for one query a kv head: so few products that a thread makes those of the k and v that it loads."""
    SLOTS: tl.constexpr = DEEP * TALL
    dtype: tl.constexpr = k.dtype.element_ty
    PER_WORD: tl.constexpr = 32 // dtype.primitive_bitwidth
    WORDS: tl.constexpr = H // PER_WORD  # of a slot
    zero = tl.program_id(2)  # of which the compiler does not know it: see signed_byte
    head = tl.program_id(0)
    split = tl.program_id(1)
    at = tl.arange(0, WIDTH)
    unit = tl.where((at % 2 == 1) & (dtype == tl.int8), 1 / 256, 1.0)
    queries = tl.load(q + head * H + at, mask=at < H, other=0).to(tl.float32) * (unit * scale)
    end = tl.maximum(tl.minimum(tl.load(positions + head // K), S - 1), 0) + 1
    share = tl.cdiv(tl.cdiv(end, SPLITS), SLOTS) * SLOTS
    begin = split * share
    count = tl.minimum(end - begin, share)  # not positive where the splits before this one have it all
    first = head.to(tl.int64) * S + begin
    k = k.to(tl.pointer_type(tl.int32)) + first * WORDS
    v = v.to(tl.pointer_type(tl.int32)) + first * WORDS
    k_scale += first
    v_scale += first

    # a thread has 16 bytes of one slot of TALL, and that DEEP times: TALL maxima and sums, and sums over DEEP slots,
    # need no other thread
    slot = tl.arange(0, SLOTS)
    word = tl.arange(0, WIDTH // PER_WORD)[None, :]
    offset = slot[:, None] * WORDS + word
    peak = tl.full([TALL], float("-inf"), tl.float32)
    total = tl.zeros([TALL], tl.float32)
    sums = tl.zeros([TALL, WIDTH], tl.float32)
    # the next slots are always on their way
    filled = slot < count
    keys, values, key_scale, value_scale = _load_slots(
        k, v, k_scale, v_scale, offset, slot, filled[:, None] & (word < WORDS), filled, SCALED
    )
    for start in range(0, count, SLOTS):
        k += SLOTS * WORDS
        v += SLOTS * WORDS
        k_scale += SLOTS
        v_scale += SLOTS
        following = slot < count - start - SLOTS
        next_keys, next_values, next_key_scale, next_value_scale = _load_slots(
            k, v, k_scale, v_scale, offset, slot, following[:, None] & (word < WORDS), following, SCALED
        )
        scores = tl.sum(_numbers(keys, zero, dtype, WIDTH) * queries[None, :], 1) * key_scale
        scores = tl.where(filled, scores, float("-inf")).reshape(DEEP, TALL)
        higher = tl.maximum(peak, tl.max(scores, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[None, :])
        fade = tl.exp2(peak - shift)
        peak = higher
        total = total * fade + tl.sum(weights, 0)
        weights = weights.reshape(SLOTS) * value_scale
        products = _numbers(values, zero, dtype, WIDTH) * weights[:, None]
        sums = sums * fade[:, None] + tl.sum(products.reshape(DEEP, TALL, WIDTH), 0)
        keys, values, key_scale, value_scale, filled = (
            next_keys, next_values, next_key_scale, next_value_scale, following
        )  # fmt: skip

    highest = tl.max(peak)
    fade = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(total * fade)
    result = tl.sum(sums * fade[:, None], 0) * unit
    if SPLITS == 1:
        tl.store(out + head * H + at, (result / total).to(out.dtype.element_ty), mask=at < H)
    else:
        place = split * (B * K) + head
        tl.store(out + place * H + at, result, mask=at < H)
        tl.store(out + SPLITS * B * K * H + place, highest)
        tl.store(out + SPLITS * B * K * (H + 1) + place, total)


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
    position = tl.maximum(tl.minimum(tl.load(positions + token), S - 1), 0)

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
        # every row sees the slots before this one
        shared = tl.maximum(begin, tl.minimum((tl.min(position) + 1) // SLOTS * SLOTS, end))
        peak, total, sums = _visit(
            begin, shared, queries, position, peak, total, sums, k, v, k_scale, v_scale, scale,
            H, WIDTH, SLOTS, SCALED, False,
        )  # fmt: skip
        begin = shared
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
        tl.store(out + place[:, None] * H + at[None, :], sums, mask=inside)
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
    # a split without a slot has maximum -inf and sums of 0: to look before loading them would take as long as loading
    inside = (split < SPLITS)[:, None] & (at < H)[None, :]
    sums = tl.load(parts + place[:, None] * H + at[None, :], mask=inside, other=0.0)
    weight = tl.exp2(peak - tl.max(peak))
    result = tl.sum(weight[:, None] * sums, 0) / tl.sum(weight * total)
    tl.store(out + row * H + at, result.to(out.dtype.element_ty), mask=at < H)


def blocks(rows: int, q_type, kv_type, memory: int) -> dict:
    """How the kernel for that many rows (T*G) of a kv head is cut; memory is a program's shared memory, in bytes.

    PROGRAMS is how many of them there should be, as long as slots are split for it.  No tile has more than four warps
    where Hopper multiplies by whole warp groups: see `jaxllm.kernels.matmul`.
    """
    few = min(max(16, triton.next_power_of_2(rows)), 64)  # tensor cores multiply 16 rows at least
    if q_type == jnp.float32:
        return dict(ROWS=min(few, 32), SLOTS=32, PROGRAMS=264, num_warps=8, num_stages=2)
    if few == 16 and kv_type == q_type and memory > 192 << 10:
        return dict(ROWS=16, SLOTS=128, PROGRAMS=132, num_warps=4, num_stages=3)
    converted = kv_type != q_type  # from int8, in registers
    return dict(
        ROWS=few,
        SLOTS=64 if few == 16 or not converted else 32,
        PROGRAMS=264,
        num_warps=2 if few == 16 and not converted else 4,
        num_stages=3,
    )


def attention(q, k, v, positions, k_scale=None, v_scale=None):
    """Attention of q [B, T, K, G, H], at positions int32 [B, T], over k and v [B, K, S, H], in q's type.

    As `reference.attention`: k and v are of q's type, or int8 with k_scale and v_scale float32 [B, K, S].  What lies
    in slots behind the largest position of a row of the batch has no influence, even if it is not finite.
    """
    B, T, K, G, H = q.shape
    scales = (positions, positions) if k_scale is None else (k_scale, v_scale)  # not used without scales
    sizes = dict(B=B, S=k.shape[2], K=K, H=H, WIDTH=max(16, triton.next_power_of_2(H)), SCALED=k_scale is not None)
    if T * G == 1:
        return _one_query(q, k, v, positions, scales, sizes)
    block = blocks(T * G, q.dtype, k.dtype, shared_memory())
    few = T * G <= FEW_ROWS
    row_blocks = triton.cdiv(T * G, block["ROWS"])
    programs = block.pop("PROGRAMS")
    splits = _splits(programs, B * K * row_blocks, k.shape[2], block["SLOTS"]) if few else 1
    out = launch(
        _attend,
        q,
        k,
        v,
        positions,
        *scales,
        out=_parts(q, splits),
        grid=(B * K, row_blocks, splits),
        scale=H**-0.5 * math.log2(math.e),
        T=T,
        G=G,
        SPLITS=splits,
        ALL_MASKED=few,
        **sizes,
        **block,
    )
    return _combined(out, q, splits, sizes["WIDTH"])


def _one_query(q, k, v, positions, scales, sizes):
    B, S, K, H, width = (sizes[name] for name in ("B", "S", "K", "H", "WIDTH"))
    tall = max(1, WARPS * 32 * 16 // (width * k.dtype.itemsize))  # slots in 16 bytes of each thread
    splits = _splits(ONE_QUERY_PROGRAMS, B * K, S, DEEP * tall)
    out = launch(
        _attend_one,
        q,
        k,
        v,
        positions,
        *scales,
        out=_parts(q, splits),
        grid=(B * K, splits),
        scale=H**-0.5 * math.log2(math.e),
        num_warps=WARPS,
        DEEP=DEEP,
        TALL=tall,
        SPLITS=splits,
        **sizes,
    )
    return _combined(out, q, splits, width)


def _splits(programs, heads, slots, block):
    """Into how many parts slots are split, of at least a block, so that there are that many programs."""
    return max(1, min(programs // heads, triton.cdiv(slots, block)))


def _parts(q, splits):
    """What the kernels write: the result, or of each split the weighted sums, then the maxima, then the totals."""
    if splits == 1:
        return jax.ShapeDtypeStruct(q.shape, q.dtype)
    return jax.ShapeDtypeStruct((splits * (q.size // q.shape[-1]) * (q.shape[-1] + 2),), jnp.float32)


def _combined(parts, q, splits, width):
    if splits == 1:
        return parts
    most = triton.next_power_of_2(splits)
    return launch(
        _combine,
        parts,
        out=_parts(q, 1),
        grid=(q.size // q.shape[-1],),
        num_warps=max(1, min(8, most * width // 512)),
        H=q.shape[-1],
        WIDTH=width,
        SPLITS=splits,
        MOST=most,
    )

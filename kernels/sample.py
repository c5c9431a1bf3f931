"""Top-k and top-p as a Triton kernel that finds where to cut without sorting.

What is kept is every logit from some threshold on.  A search narrows the floats between which that lies, and counts or
weighs the logits above two pivots at every step, until a single logit or a single float is left.  One program takes a
row.  It first searches the largest logits of many parts of the row for a bound that only few reach.  Where the
threshold is above that, the search goes on among these few alone; else it goes through the row at every step.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxllm.kernels.launch import launch

UNROLL = tl.constexpr(2)  # pieces of a row that are on their way at a time; the more, the longer the compiler takes


@triton.jit
def _key(value):
    """The place of a float32 in the order of all of them, as uint32; -0.0 comes right before 0.0."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where(bits < 0x80000000, bits + 0x80000000, 0xFFFFFFFF - bits)


@triton.jit
def _value(key):
    return tl.where(key >= 0x80000000, key - 0x80000000, 0xFFFFFFFF - key).to(tl.float32, bitcast=True)


@triton.jit
def _load(row, start, V: tl.constexpr, PIECE: tl.constexpr):
    column = start + tl.arange(0, PIECE)
    return tl.load(row + column, mask=column < V, other=float("-inf"))


@triton.jit
def _or_inf(values):
    return tl.where(values > float("-inf"), values, float("inf"))


@triton.jit
def _survey(row, V: tl.constexpr, PIECE: tl.constexpr):
    """The largest logit of each part, which is every PIECE-th column; the least that is not -inf; how many are not."""
    tops = tl.full((PIECE,), float("-inf"), tl.float32)
    lows = tl.full((PIECE,), float("inf"), tl.float32)
    finite = tl.zeros((PIECE,), tl.float32)
    for start in tl.range(0, V, PIECE, loop_unroll_factor=4 * UNROLL):
        values = _load(row, start, V, PIECE)
        tops = tl.maximum(tops, values)
        lows = tl.minimum(lows, _or_inf(values))
        finite += tl.where(values > float("-inf"), 1.0, 0.0)
    return tops, tl.min(lows, axis=0), tl.sum(finite, axis=0)


@triton.jit
def _take(row, tops, floor, few, V: tl.constexpr, PIECE: tl.constexpr):
    """All logits >= floor, perhaps some below, in a tile of PIECE, by way of memory at few; and whether they fit."""
    DEPTH: tl.constexpr = triton.next_power_of_2(triton.cdiv(V, PIECE))  # logits of a part
    number = tl.arange(0, PIECE)
    reach = (tops >= floor).to(tl.int32)
    parts = tl.sum(reach, axis=0)
    whole = parts <= PIECE // DEPTH  # all logits of the parts that reach floor fit
    count = parts
    if whole:
        place = tl.cumsum(reach, axis=0) - reach
        tl.store(few + place, number.to(tl.float32, bitcast=True), mask=tops >= floor)
    else:
        counts = tl.zeros((PIECE,), tl.int32)
        for start in tl.range(0, V, PIECE, loop_unroll_factor=UNROLL):
            counts += (_load(row, start, V, PIECE) >= floor).to(tl.int32)
        count = tl.sum(counts, axis=0)
        if count <= PIECE:
            place = tl.cumsum(counts, axis=0) - counts  # where those of a part begin
            for start in tl.range(0, V, PIECE, loop_unroll_factor=UNROLL):
                values = _load(row, start, V, PIECE)
                tl.store(few + place, values, mask=values >= floor)
                place += (values >= floor).to(tl.int32)
    tl.debug_barrier()
    if whole:
        there = number // DEPTH < parts
        part = tl.load(few + number // DEPTH, mask=there, other=0.0).to(tl.int32, bitcast=True)
        column = part + number % DEPTH * PIECE
        taken = tl.load(row + column, mask=there & (column < V), other=float("-inf"))
    else:
        taken = tl.load(few + number, mask=(number < count) & (count <= PIECE), other=float("-inf"))
    return taken, count <= PIECE


@triton.jit
def _above(values, low, high, peak, WEIGH: tl.constexpr):
    weights = tl.exp(values - peak) if WEIGH else 1.0
    return tl.join(tl.where(values >= low, weights, 0.0), tl.where(values >= high, weights, 0.0))


@triton.jit
def _measure(row, held, low, high, peak, V: tl.constexpr, PIECE: tl.constexpr, WEIGH: tl.constexpr):
    """How many logits of held, or else of the row, are >= low, and >= high; with WEIGH their sums of exp(it - peak)."""
    if held is None:
        sums = tl.zeros((PIECE, 2), tl.float32)
        for start in tl.range(0, V, PIECE, loop_unroll_factor=UNROLL):
            sums += _above(_load(row, start, V, PIECE), low, high, peak, WEIGH)
    else:
        sums = _above(held, low, high, peak, WEIGH)
    return tl.split(tl.sum(sums, axis=0))  # together, because a barrier costs more than a sum


@triton.jit
def _search(
    row, held, floor, peak, target, enough,
    V: tl.constexpr, PIECE: tl.constexpr, WEIGH: tl.constexpr,
):  # fmt: skip
    """Keys lo < hi such that the logits >= lo number (with WEIGH: weigh) target or more, and those >= hi do not.

    Those >= lo number or weigh no more than enough, or a single logit lies between lo and hi, or these are neighbours.
    Also what the logits >= lo, and >= hi, number or weigh.  floor is a bound that reaches target, and peak the largest
    logit.
    """
    lo, hi = _key(floor), _key(peak) + 1
    sum_lo, sum_hi = float("inf"), 0.0
    unit = 1.0  # what one logit near lo adds; two add more than 1.5 of it, however the sums are rounded
    linear = True
    while (hi > lo + 1) & (sum_lo > enough) & (sum_lo - sum_hi > 1.5 * unit):
        # thirds of the interval of values, which suits logits as they are, and at every other step thirds of the keys,
        # which bounds the number of steps whatever they are
        step = _value(hi) / 3 - _value(lo) / 3
        low = tl.where(linear, _key(_value(lo) + step), lo + (hi - lo + 2) // 3)
        high = tl.where(linear, _key(_value(hi) - step), hi - (hi - lo) // 3)
        low = tl.minimum(tl.maximum(low, lo + 1), hi)
        high = tl.minimum(tl.maximum(high, low), hi)
        linear = not linear
        sum_low, sum_high = _measure(row, held, _value(low), _value(high), peak, V, PIECE, WEIGH)
        low_reaches, high_reaches = sum_low >= target, sum_high >= target
        hi = tl.where(high_reaches, hi, tl.where(low_reaches, high, low))
        sum_hi = tl.where(high_reaches, sum_hi, tl.where(low_reaches, sum_high, sum_low))
        lo = tl.where(high_reaches, high, tl.where(low_reaches, low, lo))
        sum_lo = tl.where(high_reaches, sum_high, tl.where(low_reaches, sum_low, sum_lo))
        if WEIGH:
            unit = tl.exp(_value(lo) - peak)
    return lo, hi, sum_lo, sum_hi


@triton.jit
def _cut(row, held, k, p, floor, peak, weight, V: tl.constexpr, PIECE: tl.constexpr):
    """The smallest logit that stays, of those of held, or else of the row, that are >= floor.

    They are k or more.  Without top-k, k is 0, weight is that of the whole row, and they weigh what top-p asks for.
    """
    bound = floor
    if k > 0:
        lo, hi, count_lo, count_hi = _search(row, held, floor, peak, k, k, V, PIECE, False)
        bound = _value(lo)
        if p < 1:
            ties = count_lo > k  # at rank k, of which only some are among the k
            above = _value(tl.where(ties, hi, lo))
            weight, _ = _measure(row, held, above, above, peak, V, PIECE, True)
            weight += tl.where(ties, (k - count_hi) * tl.exp(bound - peak), 0.0)
    if p < 1:
        floor = tl.maximum(bound, peak - 104)  # exp(-104) is 0 in float32
        lo, _, _, _ = _search(row, held, floor, peak, p * weight, p * weight, V, PIECE, True)
        bound = _value(lo)
    return bound


@triton.jit
def _threshold(logits, top_k, top_p, out, few, V: tl.constexpr, PIECE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = logits + program * V
    k, p = tl.load(top_k + program), tl.load(top_p + program)
    k = tl.where(k < V, k, 0)
    bound = float("-inf")
    if (k > 0) | (p < 1):
        tops, floor, finite = _survey(row, V, PIECE)
        peak = tl.max(tops, axis=0)
        kept = tl.minimum(k.to(tl.float32), finite)
        rank = tl.where(k > 0, kept, PIECE // 2)
        taken, decide, weight = tops, rank <= PIECE // 2, 0.0
        if decide:
            if rank <= tl.sum((tops > float("-inf")).to(tl.int32), axis=0):
                # what so many of the parts' largest reach, so many logits reach, and seldom many more
                lowest = tl.min(_or_inf(tops), axis=0)
                lo, _, _, _ = _search(row, tops, lowest, peak, rank, 1.25 * rank, V, PIECE, False)
                floor = _value(lo)
            taken, decide = _take(row, tops, floor, few + program * PIECE, V, PIECE)
        if k <= 0:
            weight, _ = _measure(row, None, float("-inf"), peak, peak, V, PIECE, True)
            near, _ = _measure(row, taken, floor, peak, peak, V, PIECE, True)
            decide = decide & (near >= p * weight)
            floor = tl.where(decide, floor, float("-inf"))
        if decide:
            bound = _cut(row, taken, kept, p, floor, peak, weight, V, PIECE)
        else:
            bound = _cut(row, None, kept, p, floor, peak, weight, V, PIECE)
    tl.store(out + program, bound)


def _piece(width):
    """Columns that a program takes at a time, 16 bytes for each thread; also how many logits it takes out of a row."""
    return 4096 if width > 65536 else min(2048, max(128, triton.next_power_of_2(width)))


def restrict(logits, top_k, top_p):
    """Logits float32 [B, V] with those outside top-k, and of these outside top-p, at -inf.

    top_k int32 [B] keeps the k largest (0: all); top_p float32 [B] keeps the fewest largest whose softmax, over what
    top-k kept, adds up to p (1: all).  Logits that tie with the last one kept are kept.  Holtzman et al. 2020.
    """
    batch, width = logits.shape
    piece = _piece(width)
    threshold, _ = launch(
        _threshold,
        logits,
        top_k,
        top_p,
        out=(jax.ShapeDtypeStruct((batch,), "float32"), jax.ShapeDtypeStruct((batch, piece), "float32")),
        grid=(batch,),
        num_warps=piece // 128,
        V=width,
        PIECE=piece,
    )
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)

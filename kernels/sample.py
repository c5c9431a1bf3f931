"""Top-k and top-p as a Triton kernel that finds where to cut without sorting.

What is kept is every logit from some threshold on.  A search narrows the floats between which that lies, and counts or
weighs the logits above two pivots at every step, until a single logit or a single float is left.  One program takes a
row, which stays in registers if it fits there.
"""

import jax
import triton
import triton.language as tl

from jaxllm.kernels.launch import launch

HELD = 32768  # columns that a program holds in registers
PIECE = 4096  # columns that it takes at a time of a longer row, once for every step of the search


def _tile(width):
    """The columns of a piece of a row, the pieces that a program holds in registers (2^n, or none), and its warps."""
    if width > HELD:
        return PIECE, 0, 16
    warps = min(8, max(1, triton.next_power_of_2(width) // 1024))
    piece = warps * 128  # 16 bytes for each thread
    return piece, triton.next_power_of_2(triton.cdiv(width, piece)), warps


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
def _above(values, low, high, peak, WEIGH: tl.constexpr):
    weights = tl.exp(values - peak) if WEIGH else 1.0
    return tl.join(tl.where(values >= low, weights, 0.0), tl.where(values >= high, weights, 0.0))


@triton.jit
def _measure(row, held, low, high, peak, V: tl.constexpr, PIECE: tl.constexpr, WEIGH: tl.constexpr):
    """How many logits are >= low, and >= high; with WEIGH the sums of exp(logit - peak) of those instead."""
    sums = tl.zeros((PIECE, 2), tl.float32)
    if held is None:
        for start in tl.range(0, V, PIECE):
            sums += _above(_load(row, start, V, PIECE), low, high, peak, WEIGH)
    else:
        sums = tl.sum(_above(held, low, high, peak, WEIGH), axis=0)
    return tl.split(tl.sum(sums, axis=0))  # together, because a barrier costs more than a sum


@triton.jit
def _survey(row, held, V: tl.constexpr, PIECE: tl.constexpr):
    """The largest logit, the smallest that is not -inf, and how many are not."""
    peaks = tl.full((PIECE,), float("-inf"), tl.float32)
    lows = tl.full((PIECE,), float("inf"), tl.float32)
    finite = tl.zeros((PIECE,), tl.int32)
    if held is None:
        for start in tl.range(0, V, PIECE):
            values = _load(row, start, V, PIECE)
            peaks = tl.maximum(peaks, values)
            lows = tl.minimum(lows, _or_inf(values))
            finite += (values > float("-inf")).to(tl.int32)
    else:
        peaks = tl.max(held, axis=0)
        lows = tl.min(_or_inf(held), axis=0)
        finite = tl.sum((held > float("-inf")).to(tl.int32), axis=0)
    return tl.max(peaks, axis=0), tl.min(lows, axis=0), tl.sum(finite, axis=0)


@triton.jit
def _or_inf(values):
    return tl.where(values > float("-inf"), values, float("inf"))


@triton.jit
def _search(row, held, floor, peak, target, V: tl.constexpr, PIECE: tl.constexpr, WEIGH: tl.constexpr):
    """Keys lo < hi such that the logits >= lo number (with WEIGH: weigh) target or more, and those >= hi do not.

    Either a single logit lies between them, or lo and hi are neighbours.  Also what the logits >= lo, and >= hi, number
    or weigh.  floor is a bound that reaches target, and peak the largest logit.
    """
    lo, hi = _key(floor), _key(peak) + 1
    sum_lo, sum_hi = float("inf"), 0.0
    unit = 1.0  # what one logit near lo adds; two add more than 1.5 of it, however the sums are rounded
    linear = True
    while (hi > lo + 1) & (sum_lo - sum_hi > 1.5 * unit):
        # thirds of the interval of values, which suits logits as they are, and at every other step thirds of the keys,
        # which bounds the number of steps whatever they are
        step = _value(hi) / 3 - _value(lo) / 3
        low = tl.where(linear, _key(_value(lo) + step), lo + (hi - lo + 2) // 3)
        high = tl.where(linear, _key(_value(hi) - step), hi - (hi - lo) // 3)
        low = tl.minimum(tl.maximum(low, lo + 1), hi)
        high = tl.minimum(tl.maximum(high, low), hi)
        linear = not linear
        # this is peak, but the compiler cannot know it: else it computes all weights before the loop, for which there
        # are no registers
        same_peak = tl.maximum(peak, _value(lo))
        sum_low, sum_high = _measure(row, held, _value(low), _value(high), same_peak, V, PIECE, WEIGH)
        low_reaches, high_reaches = sum_low >= target, sum_high >= target
        hi = tl.where(high_reaches, hi, tl.where(low_reaches, high, low))
        sum_hi = tl.where(high_reaches, sum_hi, tl.where(low_reaches, sum_high, sum_low))
        lo = tl.where(high_reaches, high, tl.where(low_reaches, low, lo))
        sum_lo = tl.where(high_reaches, sum_high, tl.where(low_reaches, sum_low, sum_lo))
        if WEIGH:
            unit = tl.exp(_value(lo) - peak)
    return lo, hi, sum_lo, sum_hi


@triton.jit
def _restrict(logits, top_k, top_p, out, V: tl.constexpr, PIECE: tl.constexpr, HELD: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = logits + program * V
    k, p = tl.load(top_k + program), tl.load(top_p + program)
    # as one tensor: of 32 pieces by themselves the compiler makes the same in four times as many seconds
    column = tl.arange(0, HELD)[:, None] * PIECE + tl.arange(0, PIECE) if HELD else None
    held = tl.load(row + column, mask=column < V, other=float("-inf")) if HELD else None
    peak, lowest, finite = _survey(row, held, V, PIECE)
    bound, above, tied = lowest, lowest, 0.0
    if (k > 0) & (k < V):
        kept = tl.minimum(k, finite).to(tl.float32)
        lo, hi, count_lo, count_hi = _search(row, held, lowest, peak, kept, V, PIECE, False)
        bound = _value(lo)
        if count_lo > kept:  # ties at rank k, of which only some are among the k
            above = _value(hi)
            tied = (kept - count_hi) * tl.exp(bound - peak)
        else:
            above = bound
    if p < 1:
        weight, _ = _measure(row, held, above, above, peak, V, PIECE, True)
        floor = tl.maximum(bound, peak - 104)  # exp(-104) is 0 in float32
        lo, _, _, _ = _search(row, held, floor, peak, p * (weight + tied), V, PIECE, True)
        bound = _value(lo)
    if HELD:
        tl.store(out + program * V + column, tl.where(held >= bound, held, float("-inf")), mask=column < V)
    else:
        for start in tl.range(0, V, PIECE):
            values = _load(row, start, V, PIECE)
            place = start + tl.arange(0, PIECE)
            tl.store(out + program * V + place, tl.where(values >= bound, values, float("-inf")), mask=place < V)


def restrict(logits, top_k, top_p):
    """Logits float32 [B, V] with those outside top-k, and of these outside top-p, at -inf.

    top_k int32 [B] keeps the k largest (0: all); top_p float32 [B] keeps the fewest largest whose softmax, over what
    top-k kept, adds up to p (1: all).  Logits that tie with the last one kept are kept.  Holtzman et al. 2020.
    """
    batch, width = logits.shape
    piece, held, warps = _tile(width)
    return launch(
        _restrict,
        logits,
        top_k,
        top_p,
        out=jax.ShapeDtypeStruct(logits.shape, logits.dtype),
        grid=(batch,),
        num_warps=warps,
        V=width,
        PIECE=piece,
        HELD=held,
    )

"""Softmax over the last axis as a Triton kernel: short rows are held in registers, longer ones read again out of L2."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxllm.kernels.launch import launch, row_tile

HELD = 32768  # columns that a program holds in registers: 32 a thread, of 1024 threads
PIECE = 4096  # columns of a longer row that a program takes: 32 a thread, of 128 threads
AHEAD = 8 << 20  # bytes read between a piece's two readings: with half the second waits, with twice L2 has lost some
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; a maximum that starts there is never -inf


@triton.jit
def _held(x, out, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    at = row[:, None] * SIZE + column
    values = tl.load(x + at, mask=column < SIZE, other=float("-inf")).to(tl.float32)
    values = tl.exp(values - tl.max(values, axis=1)[:, None])
    values *= (1 / tl.sum(values, axis=1))[:, None]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=column < SIZE)


@triton.jit
def _load(x, piece, SIZE: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    column = piece % PIECES * BLOCK + tl.arange(0, BLOCK)
    at = (piece // PIECES).to(tl.int64) * SIZE + column
    values = tl.load(x + at, mask=column < SIZE, other=float("-inf"), eviction_policy=POLICY)
    return values.to(tl.float32), at, column < SIZE


@triton.jit
def _split(
    x, words, out,
    SIZE: tl.constexpr, PIECES: tl.constexpr, ALL: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Even programs leave the maximum and the sum of a piece in a word; odd ones wait for all of a row, and write.

    A word is 0 until both are there.  They come at once and announce nothing else, so that no barrier is needed.
    Programs start in the order of their numbers, and even ones never wait: however few run at a time, the words come.
    """
    COUNT: tl.constexpr = triton.next_power_of_2(PIECES)
    words = words.to(tl.pointer_type(tl.uint64))
    turn = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        if turn < ALL:
            values, _, _ = _load(x, turn, SIZE, PIECES, BLOCK, "evict_last")
            peak = tl.maximum(tl.max(values, axis=0), LOWEST)
            total = tl.sum(tl.exp(values - peak), axis=0).to(tl.uint32, bitcast=True).to(tl.uint64)
            tl.atomic_xchg(words + turn, total << 32 | peak.to(tl.uint32, bitcast=True), sem="relaxed")
    elif turn >= AHEAD:
        piece = turn - AHEAD
        values, at, mask = _load(x, piece, SIZE, PIECES, BLOCK, "evict_first")
        number = tl.arange(0, COUNT)
        word = words + piece // PIECES * PIECES + number
        both = tl.load(word, mask=number < PIECES, other=0xFF7FFFFF, volatile=True)  # else LOWEST, and a sum of 0
        while tl.sum((both == 0).to(tl.int32), axis=0) > 0:
            both = tl.load(word, mask=number < PIECES, other=0xFF7FFFFF, volatile=True)
        peaks = both.to(tl.uint32).to(tl.float32, bitcast=True)
        sums = (both >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
        peak = tl.max(peaks, axis=0)
        values = tl.exp(values - peak) * (1 / tl.sum(sums * tl.exp(peaks - peak), axis=0))
        tl.store(out + at, values.to(out.dtype.element_ty), mask=mask, eviction_policy="evict_first")


def softmax(x):
    """exp(x) over its sum along the last axis of x [..., n]; in x's type.  A row of -inf alone gives NaN."""
    width = x.shape[-1]
    count = x.size // width
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if width <= HELD:
        rows, block, warps = row_tile(count, width)
        return launch(_held, x, out=out, grid=(count // rows,), num_warps=warps, SIZE=width, ROWS=rows, BLOCK=block)
    pieces = triton.cdiv(width, PIECE)
    words = jnp.zeros((count * pieces, 2), "uint32")
    ahead = min(count * pieces, max(pieces, AHEAD // (PIECE * x.dtype.itemsize)))
    result, _ = launch(
        _split,
        x,
        words,
        out=(out, jax.ShapeDtypeStruct(words.shape, words.dtype)),
        grid=(2 * (count * pieces + ahead),),
        aliases={1: 1},
        num_warps=max(1, PIECE // 1024),
        SIZE=width,
        PIECES=pieces,
        ALL=count * pieces,
        AHEAD=ahead,
        BLOCK=PIECE,
    )
    return result

"""Softmax over the last axis as a Triton kernel: rows that fit into registers are read once, longer ones twice."""

import jax
import triton
import triton.language as tl

from jaxllm.kernels.launch import launch, row_tile

HELD = 32768  # columns that a program holds in registers: 32 a thread, of 1024 threads
PIECE = 8192  # columns that it takes at a time of a longer row
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
def _streamed(x, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * SIZE
    # every lane has a maximum and a sum of its own (Milakov and Gimelshein 2018), which meet after the last block
    peaks = tl.full((BLOCK,), LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(x + row + column, mask=column < SIZE, other=float("-inf")).to(tl.float32)
        smaller = tl.exp(-tl.abs(values - peaks))  # the smaller of the two over the larger
        sums = tl.where(values > peaks, sums * smaller + 1, sums + smaller)
        peaks = tl.maximum(peaks, values)
    peak = tl.max(peaks, axis=0)
    scale = 1 / tl.sum(sums * tl.exp(peaks - peak), axis=0)
    for start in tl.range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(x + row + column, mask=column < SIZE, other=float("-inf")).to(tl.float32)
        values = tl.exp(values - peak) * scale
        tl.store(out + row + column, values.to(out.dtype.element_ty), mask=column < SIZE)


def softmax(x):
    """exp(x) over its sum along the last axis of x [..., n]; in x's type.  A row of -inf alone gives NaN."""
    width = x.shape[-1]
    rows, block, warps = row_tile(x.size // width, width) if width <= HELD else (1, PIECE, 32)
    constants = {"SIZE": width, "BLOCK": block}
    if width <= HELD:
        constants["ROWS"] = rows
    return launch(
        _held if width <= HELD else _streamed,
        x,
        out=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.size // width // rows,),
        num_warps=warps,
        **constants,
    )

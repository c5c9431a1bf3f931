"""Products with a weight matrix as Triton kernels: one row, few rows and many rows of inputs; float and int8 weights.

With one row of inputs a weight is read for a single product, so that kernel is built around its loads.  From two rows
on, a program makes a tile of the result with `tl.dot`.  Weights are the left operand there: on Hopper only that one may
come from registers, which is where int8 weights are converted.
"""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxllm.kernels import reference
from jaxllm.kernels.launch import launch
from jaxllm.kernels.rms_norm import rms_norm

GROUP = tl.constexpr(reference.GROUP)
FEW_ROWS = 16  # up to here the time goes into reading the weights, and a norm may be fused


# One row.  A thread owns a chunk of a row of weights, the 16 bytes of one load, and the inputs that go with it.


@triton.jit
def _load(pointer, at, IN: tl.constexpr, MASKED: tl.constexpr, policy: tl.constexpr):
    if MASKED:
        return tl.load(pointer + at, mask=at < IN, other=0, eviction_policy=policy)
    else:
        return tl.load(pointer + at, eviction_policy=policy)


@triton.jit
def _load_chunks(pointer, number, IN: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, MASKED: tl.constexpr):
    """float32 [CHUNKS * C], block number of what is at pointer, in loads of 16 bytes and with a chunk in one thread."""
    WIDTH: tl.constexpr = min(C, 128 // pointer.dtype.element_ty.primitive_bitwidth)
    chunk = number * CHUNKS + tl.arange(0, CHUNKS)
    at = chunk[:, None] * C + tl.arange(0, WIDTH)[None, :]
    first = _load(pointer, at, IN, MASKED, "")
    if C == WIDTH:
        values = first
    elif C == 2 * WIDTH:
        values = tl.join(first, _load(pointer, at + WIDTH, IN, MASKED, "")).permute(0, 2, 1)
    else:
        tl.static_assert(C == 4 * WIDTH)
        even = tl.join(first, _load(pointer, at + 2 * WIDTH, IN, MASKED, ""))
        odd = tl.join(_load(pointer, at + WIDTH, IN, MASKED, ""), _load(pointer, at + 3 * WIDTH, IN, MASKED, ""))
        values = tl.join(even, odd).permute(0, 2, 3, 1)
    return values.reshape(CHUNKS * C).to(tl.float32)


@triton.jit
def _byte(word, zero, NUMBER: tl.constexpr):
    """The signed byte 0 of a word as float32, or byte 1 times 256."""
    # the hardware converts integers at a quarter of the rate at which it adds.  The byte with its sign flipped, which
    # is 128 more, becomes the low bits of the mantissa of 2^23, and one subtraction leaves the number, exactly
    UNIT: tl.constexpr = 256 if NUMBER == 1 else 1
    bits = (word & (0xFF * UNIT)) ^ (0x4B000000 + 0x80 * UNIT + zero)
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + 128 * UNIT)


@triton.jit
def _products(acc, w, x, dtype: tl.constexpr, PER_WORD: tl.constexpr):
    """acc [ROWS, WORDS] plus products of w [ROWS, WORDS] and x [WORDS * PER_WORD]: a word is so many numbers of w."""
    if PER_WORD == 1:
        acc += w.to(tl.float32) * x[None, :]
    elif PER_WORD == 2:
        x0, x1 = x.reshape(w.shape[1], 2).split()
        acc += w.to(tl.int16).to(dtype, bitcast=True).to(tl.float32) * x0[None, :]
        acc += (w >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32) * x1[None, :]
    else:
        even, odd = x.reshape(w.shape[1], 2, 2).split()
        x0, x2 = even.split()
        x1, x3 = odd.split()
        # the two operations on bits are one instruction if one of their constants is in a register, which takes a zero
        # that the compiler does not know: grids have one axis
        zero = tl.program_id(1)
        acc += _byte(w, zero, 0) * x0[None, :]
        acc += _byte(w, zero, 1) * (x1 / 256)[None, :]
        acc += _byte(w >> 16, zero, 0) * x2[None, :]
        acc += _byte(w >> 16, zero, 1) * (x3 / 256)[None, :]
    return acc


@triton.jit
def _add_block(
    acc, w, x, norm, factor, scale, row, number,
    dtype: tl.constexpr, IN: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, PER_WORD: tl.constexpr,
    SCALES: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc plus the products of block number of the weights with its inputs, times the scales of their groups if any."""
    values = _load_chunks(x, number, IN, C, CHUNKS, MASKED)
    if NORM:
        values = values * factor * _load_chunks(norm, number, IN, C, CHUNKS, MASKED)
        values = values.to(x.dtype.element_ty).to(tl.float32)
    if SCALES > 1:
        group = (number * CHUNKS + tl.arange(0, CHUNKS)) * C // GROUP
        scales = _load(scale + row[:, None] * SCALES, group[None, :], SCALES, MASKED, "").to(tl.float32)
        products = _products(tl.zeros_like(acc), w, values, dtype, PER_WORD)
        products = products.reshape(acc.shape[0], CHUNKS, C // PER_WORD) * scales[:, :, None]
        return acc + products.reshape(acc.shape[0], acc.shape[1])
    else:
        return _products(acc, w, values, dtype, PER_WORD)


@triton.jit
def _one_row(
    x, w, scale, norm, residual, out, eps,
    IN: tl.constexpr, OUT: tl.constexpr, PER_WORD: tl.constexpr,
    SCALES: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """x [IN] times w [OUT, IN], or w [2, OUT, IN] with SWIGLU.

    Weights are read as words of PER_WORD numbers, or one by one.  SCALES is how many scales a row of w has.
    """
    dtype: tl.constexpr = w.dtype.element_ty
    C: tl.constexpr = 128 // dtype.primitive_bitwidth
    BLOCKS: tl.constexpr = (IN + CHUNKS * C - 1) // (CHUNKS * C)
    TAIL: tl.constexpr = IN % (CHUNKS * C) != 0
    WORDS: tl.constexpr = CHUNKS * C // PER_WORD
    IN_WORDS: tl.constexpr = IN // PER_WORD
    PARTS: tl.constexpr = 2 if SWIGLU else 1
    # with SWIGLU, a row of the gate and a row of up take turns
    part = tl.arange(0, ROWS) % PARTS
    row = tl.minimum(tl.program_id(0) * (ROWS // PARTS) + tl.arange(0, ROWS) // PARTS, OUT - 1)
    row = row.to(tl.int64) + part * OUT
    if PER_WORD > 1:
        w = w.to(tl.pointer_type(tl.int32))
    row_of_w = (w + row * IN_WORDS)[:, None]
    at = tl.arange(0, WORDS)[None, :]

    # a block of weights is always on its way: the first during the norm's pass over x, the next during the products
    block = _load(row_of_w, at, IN_WORDS, TAIL and BLOCKS == 1, "evict_first")
    factor = 1.0
    if NORM:
        squares = tl.zeros((CHUNKS * C,), tl.float32)
        for number in range(BLOCKS):
            values = _load_chunks(x, number, IN, C, CHUNKS, TAIL)
            squares += values * values
        factor = tl.rsqrt(tl.sum(squares) / IN + eps)
    acc = tl.zeros((ROWS, WORDS), tl.float32)
    for number in range(BLOCKS - 2):
        following = _load(row_of_w, (number + 1) * WORDS + at, IN_WORDS, False, "evict_first")
        acc = _add_block(
            acc, block, x, norm, factor, scale, row, number, dtype, IN, C, CHUNKS, PER_WORD, SCALES, NORM, False
        )
        block = following
    if BLOCKS > 1:
        following = _load(row_of_w, (BLOCKS - 1) * WORDS + at, IN_WORDS, TAIL, "evict_first")
        acc = _add_block(
            acc, block, x, norm, factor, scale, row, BLOCKS - 2, dtype, IN, C, CHUNKS, PER_WORD, SCALES, NORM, False
        )
        block = following
    acc = _add_block(
        acc, block, x, norm, factor, scale, row, BLOCKS - 1, dtype, IN, C, CHUNKS, PER_WORD, SCALES, NORM, TAIL
    )

    result = tl.sum(acc, axis=1)
    if SCALES == 1:
        result *= tl.load(scale + row).to(tl.float32)
    if SWIGLU:
        gate, up = result.reshape(ROWS // 2, 2).split()
        result = gate * tl.sigmoid(gate) * up
    column = tl.program_id(0) * (ROWS // PARTS) + tl.arange(0, ROWS // PARTS)
    if RESIDUAL:
        result += tl.load(residual + column, mask=column < OUT).to(tl.float32)
    tl.store(out + column, result.to(out.dtype.element_ty), mask=column < OUT)


# From two rows on.


@triton.jit
def _as_operand(w, dtype: tl.constexpr):
    """A tile of weights in the type of the inputs, into which int8 goes exactly."""
    if w.dtype == tl.int8 and dtype != tl.int8:
        w = _byte(w.to(tl.int32), 0, 0)
    return w.to(dtype)


@triton.jit
def _load_inputs(row_of_x, at, inside, IN: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_IN, BLOCK_ROWS] of the rows at row_of_x [BLOCK_ROWS]."""
    if MASKED:
        return tl.load(row_of_x[None, :] + at[:, None], mask=(at < IN)[:, None] & inside[None, :], other=0)
    elif RAGGED:
        return tl.load(row_of_x[None, :] + at[:, None], mask=inside[None, :], other=0)
    else:
        return tl.load(row_of_x[None, :] + at[:, None])


@triton.jit
def _add_tile(
    acc, row_of_w, row_of_scale, inputs, start,
    IN: tl.constexpr, SCALES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc plus w [BLOCK_OUT, BLOCK_IN] times inputs [BLOCK_IN, BLOCK_ROWS], times the scale of their group if any."""
    at = start + tl.arange(0, inputs.shape[0])
    w = _as_operand(_load(row_of_w[:, None], at[None, :], IN, MASKED, ""), inputs.dtype)
    if SCALES > 1:
        scale = tl.load(row_of_scale + start // GROUP).to(tl.float32)
        return acc + tl.dot(w, inputs, input_precision=PRECISION, out_dtype=acc.dtype) * scale[:, None]
    else:
        return tl.dot(w, inputs, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _scaled(acc, x_scale, row_of_scale, inside, X_SCALE: tl.constexpr, SCALES: tl.constexpr):
    """A tile of sums in float32, times the scales of its rows of x and of w, where these have one each."""
    result = acc.to(tl.float32)
    if X_SCALE:
        result *= tl.load(x_scale, mask=inside, other=0).to(tl.float32)[None, :]
    if SCALES == 1:
        result *= tl.load(row_of_scale).to(tl.float32)[:, None]
    return result


@triton.jit
def _tile(
    x, x_scale, w, scale, norm, residual, out, eps,
    R: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    SCALES: tl.constexpr, X_SCALE: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, BAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x [R, IN] times w [OUT, IN], or w [2, OUT, IN] with SWIGLU, and what is fused with it."""
    # programs that run at the same time share inputs and weights in L2: they take a band of the result, BAND tiles wide
    ROW_TILES: tl.constexpr = (R + BLOCK_ROWS - 1) // BLOCK_ROWS
    OUT_TILES: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    band = tl.program_id(0) // (BAND * ROW_TILES)
    place = tl.program_id(0) % (BAND * ROW_TILES)
    wide = tl.minimum(OUT_TILES - band * BAND, BAND)
    column = (band * BAND + place % wide) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = place // wide * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)

    MASKED: tl.constexpr = IN % BLOCK_IN != 0
    RAGGED: tl.constexpr = R % BLOCK_ROWS != 0
    inside = row < R
    row_of_x = x + row.to(tl.int64) * IN
    row_of_w = w + tl.minimum(column, OUT - 1).to(tl.int64) * IN
    row_of_scale = scale + tl.minimum(column, OUT - 1).to(tl.int64) * SCALES
    factor = 1.0
    if NORM:
        squares = tl.zeros((BLOCK_IN, BLOCK_ROWS), tl.float32)
        for start in range(0, IN, BLOCK_IN):
            at = start + tl.arange(0, BLOCK_IN)
            inputs = _load_inputs(row_of_x, at, inside, IN, RAGGED, MASKED).to(tl.float32)
            squares += inputs * inputs
        factor = tl.rsqrt(tl.sum(squares, axis=0) / IN + eps)[None, :]

    sum_type: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), sum_type)
    if SWIGLU:
        up = tl.zeros((BLOCK_OUT, BLOCK_ROWS), sum_type)
    for start in range(0, IN, BLOCK_IN):
        at = start + tl.arange(0, BLOCK_IN)
        inputs = _load_inputs(row_of_x, at, inside, IN, RAGGED, MASKED)
        if NORM:
            normed = inputs.to(tl.float32) * factor * _load(norm, at, IN, MASKED, "").to(tl.float32)[:, None]
            inputs = normed.to(inputs.dtype)
        acc = _add_tile(acc, row_of_w, row_of_scale, inputs, start, IN, SCALES, MASKED, PRECISION)
        if SWIGLU:
            second = row_of_w + OUT * IN
            up = _add_tile(up, second, row_of_scale + OUT * SCALES, inputs, start, IN, SCALES, MASKED, PRECISION)

    result = _scaled(acc, x_scale + row, row_of_scale, inside, X_SCALE, SCALES)
    if SWIGLU:
        up = _scaled(up, x_scale + row, row_of_scale + OUT, inside, X_SCALE, SCALES)
        result = result * tl.sigmoid(result) * up
    inside = (column < OUT)[:, None] & inside[None, :]
    place = row.to(tl.int64)[None, :] * OUT + column[:, None]
    if RESIDUAL:
        result += tl.load(residual + place, mask=inside).to(tl.float32)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def one_row_blocks(outputs, inputs, dtype, x_dtype):
    """How the kernel for one row is cut: a program's rows of w, and the chunks of 16 bytes of a row at a time."""
    chunks = triton.next_power_of_2(triton.cdiv(inputs * dtype.itemsize, 16))
    # more rows share the work on the inputs, as long as the programs still fill the GPU
    rows = 8 if outputs >= 8192 * dtype.itemsize else 4
    # an int8 chunk stands against 16 inputs, which as float32 are as many registers
    most = 64 if dtype == jnp.int8 and x_dtype == jnp.float32 else 128
    return {"ROWS": rows, "CHUNKS": min(most, max(32, chunks)), "num_warps": 4}


def tile_blocks(rows, outputs, inputs, x_dtype, w_dtype, gated, grouped):
    """How the kernel for several rows is cut.  Shared memory stays below the 99 KB of consumer cards."""
    if x_dtype == jnp.float32:
        # no tensor cores: every product is an instruction
        size = {"BLOCK_OUT": 32 if gated else 64, "BLOCK_ROWS": 16 if rows <= 16 else 64, "BLOCK_IN": 32}
        return size | {"num_warps": 4, "num_stages": 3}
    stages = 2 if w_dtype == jnp.float32 else 3  # the tiles of which are large
    if rows <= FEW_ROWS:
        # as tall as leaves some programs to every multiprocessor: each of them reads all of x
        tall = min(64, max(16, triton.next_power_of_2(outputs // 512)))
        tall = max(16, tall // 2) if gated else tall
        # at most 512 bytes of a row of w at a time, and 24 KB of w and x, of which several are on their way
        column_bytes = tall * (2 if gated else 1) * w_dtype.itemsize + 16 * x_dtype.itemsize
        wide = min(512 // w_dtype.itemsize, triton.next_power_of_2(24 * 1024 // column_bytes + 1) // 2)
        wide = 128 if grouped else max(128, math.gcd(inputs, wide))  # without a mask, where that can be
        size = {"BLOCK_OUT": tall, "BLOCK_ROWS": 16, "BLOCK_IN": wide}
        return size | {"num_warps": 2 if tall == 16 else 4, "num_stages": stages + 1}
    if rows <= 128:
        size = {"BLOCK_OUT": 32 if gated or outputs <= 4096 else 64, "BLOCK_ROWS": 32 if rows <= 32 else 64}
        return size | {"BLOCK_IN": 128, "num_warps": 4, "num_stages": stages}
    size = {"BLOCK_OUT": 64 if gated else 128, "BLOCK_ROWS": 128, "BLOCK_IN": 64 if x_dtype != jnp.int8 else 128}
    return size | {"num_warps": 8, "num_stages": stages}


def _launch_tiles(x, x_scale, w, scale, norm, eps, residual, gated, out):
    rows, outputs = x.size // x.shape[-1], w.size // w.shape[-1] // (2 if gated else 1)
    blocks = tile_blocks(rows, outputs, x.shape[-1], x.dtype, w.dtype, gated, _scales(w, scale) > 1)
    tiles = triton.cdiv(outputs, blocks["BLOCK_OUT"]) * triton.cdiv(rows, blocks["BLOCK_ROWS"])
    return launch(
        _tile,
        x,
        x if x_scale is None else x_scale,
        w,
        *(x if array is None else array for array in (scale, norm, residual)),
        out=out,
        grid=(tiles,),
        eps=eps,
        R=rows,
        IN=x.shape[-1],
        OUT=outputs,
        SCALES=_scales(w, scale),
        X_SCALE=x_scale is not None,
        NORM=norm is not None,
        RESIDUAL=residual is not None,
        SWIGLU=gated,
        BAND=8,
        PRECISION="ieee",
        **blocks,
    )


def _scales(w, scale):
    """How many scales a row of w has."""
    return 0 if scale is None else scale.size // (w.size // w.shape[-1])


def matmul(x, w, scale=None, norm=None, eps=0.0, residual=None, gated=False, dtype=jnp.float32):
    """x [..., in] times w [*out, in] transposed, in dtype: [..., *out].

    w is float, or int8 with scale [*out] (one an output channel) or [*out, groups] (one a group of 128 inputs).  With
    norm [in], x is first replaced by its RMSNorm with eps.  With gated, w is [2, F, in], and the result is
    silu(gate) * up [..., F].  residual is added to the result, in its shape.  Sums are in float32.
    """
    rows = math.prod(x.shape[:-1])
    if norm is not None and rows > FEW_ROWS:
        x, norm = rms_norm(x, norm, eps), None  # every program would have to read whole rows
    out = _result(x, w, gated, dtype)
    if rows > 1:
        return _launch_tiles(x, None, w, scale, norm, eps, residual, gated, out)
    blocks = one_row_blocks(w.size // w.shape[-1], x.shape[-1], w.dtype, x.dtype)
    return launch(
        _one_row,
        x,
        w,
        *(x if array is None else array for array in (scale, norm, residual)),
        out=out,
        grid=(triton.cdiv(out.size, blocks["ROWS"] // (2 if gated else 1)),),
        eps=eps,
        IN=x.shape[-1],
        OUT=out.size,
        SCALES=_scales(w, scale),
        NORM=norm is not None,
        RESIDUAL=residual is not None,
        SWIGLU=gated,
        PER_WORD=4 // w.dtype.itemsize if x.shape[-1] * w.dtype.itemsize % 4 == 0 else 1,
        **blocks,
    )


def w8a8_matmul(x, x_scale, w, scale, residual=None, gated=False, dtype=jnp.float32):
    """int8 x [..., in] times int8 w [*out, in] transposed, in dtype: [..., *out].

    Sums are in int32, then multiplied by x_scale [...] and scale [*out]; residual and gated as in `matmul`.
    """
    return _launch_tiles(x, x_scale, w, scale, None, 0.0, residual, gated, _result(x, w, gated, dtype))


def _result(x, w, gated, dtype):
    return jax.ShapeDtypeStruct((*x.shape[:-1], *w.shape[1 if gated else 0 : -1]), dtype)

"""Products with a weight matrix as Triton kernels: one row, few rows and many rows of inputs; float and int8 weights.

With one row of inputs a weight is read for a single product, so that kernel is built around its loads.  From two rows
on, a program makes a tile of the result with `tl.dot`.  Weights are the right operand there: the left one, if it were
converted from int8, would come from registers on Hopper, where ptxas before 13.3 lets it change too early (Triton's
issue 9433).  For the same reason tiles that Hopper multiplies by whole warp groups have a single one, of four warps:
Triton up to 3.8 does not keep two of them together (issue 11047).
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxllm.kernels import reference
from jaxllm.kernels.launch import launch, shared_memory
from jaxllm.kernels.rms_norm import rms_norm

GROUP = tl.constexpr(reference.GROUP)
FEW_ROWS = 16  # up to here the time goes into reading the weights alone
PROGRAMS = 264  # that a GPU should have at least: 2 for each of an H100's 132 multiprocessors
JOINED = 512  # outputs that a program adds up, where sums were split


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
def signed_byte(word, zero, NUMBER: tl.constexpr):
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
        acc += signed_byte(w, zero, 0) * x0[None, :]
        acc += signed_byte(w, zero, 1) * (x1 / 256)[None, :]
        acc += signed_byte(w >> 16, zero, 0) * x2[None, :]
        acc += signed_byte(w >> 16, zero, 1) * (x3 / 256)[None, :]
    return acc


@triton.jit
def _add_block(
    acc, squares, w, x, norm, scale, row, number,
    dtype: tl.constexpr, IN: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, PER_WORD: tl.constexpr,
    SCALES: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc plus the products of block number of the weights with its inputs, times the scales of their groups if any.

    With NORM the inputs are multiplied by it, and their squares are added to squares [CHUNKS].
    """
    values = _load_chunks(x, number, IN, C, CHUNKS, MASKED)
    if NORM:
        squares += tl.sum((values * values).reshape(CHUNKS, C), axis=1)
        values *= _load_chunks(norm, number, IN, C, CHUNKS, MASKED)
    if SCALES > 1:
        group = (number * CHUNKS + tl.arange(0, CHUNKS)) * C // GROUP
        scales = _load(scale + row[:, None] * SCALES, group[None, :], SCALES, MASKED, "").to(tl.float32)
        products = _products(tl.zeros_like(acc), w, values, dtype, PER_WORD)
        products = products.reshape(acc.shape[0], CHUNKS, C // PER_WORD) * scales[:, :, None]
        acc += products.reshape(acc.shape[0], acc.shape[1])
    else:
        acc = _products(acc, w, values, dtype, PER_WORD)
    return acc, squares


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

    # a block of weights is always on its way.  The root mean square of x divides the sums at last: it is known then,
    # without a pass over x in front
    block = _load(row_of_w, at, IN_WORDS, TAIL and BLOCKS == 1, "evict_first")
    acc = tl.zeros((ROWS, WORDS), tl.float32)
    squares = tl.zeros((CHUNKS,), tl.float32)
    for number in range(BLOCKS - 2):
        following = _load(row_of_w, (number + 1) * WORDS + at, IN_WORDS, False, "evict_first")
        acc, squares = _add_block(
            acc, squares, block, x, norm, scale, row, number, dtype, IN, C, CHUNKS, PER_WORD, SCALES, NORM, False
        )
        block = following
    if BLOCKS > 1:
        following = _load(row_of_w, (BLOCKS - 1) * WORDS + at, IN_WORDS, TAIL, "evict_first")
        acc, squares = _add_block(
            acc, squares, block, x, norm, scale, row, BLOCKS - 2, dtype, IN, C, CHUNKS, PER_WORD, SCALES, NORM, False
        )
        block = following
    acc, squares = _add_block(
        acc, squares, block, x, norm, scale, row, BLOCKS - 1, dtype, IN, C, CHUNKS, PER_WORD, SCALES, NORM, TAIL
    )

    result = tl.sum(acc, axis=1)
    if SCALES == 1:
        result *= tl.load(scale + row).to(tl.float32)
    if NORM:
        result *= tl.rsqrt(tl.sum(squares) / IN + eps)
    if SWIGLU:
        gate, up = result.reshape(ROWS // 2, 2).split()
        result = gate * tl.sigmoid(gate) * up
    column = tl.program_id(0) * (ROWS // PARTS) + tl.arange(0, ROWS // PARTS)
    if RESIDUAL:
        result += tl.load(residual + column, mask=column < OUT).to(tl.float32)
    tl.store(out + column, result.to(out.dtype.element_ty), mask=column < OUT)


# From two rows on.


# v is bf16(0x4300 | its low seven bits) - bf16(0x4300 | its sign bit): 128 + v or 256 + v, less 128 or 256, exactly
INT8_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 low, high, a, b, c, d, one;
    mov.b32 one, 0x3f803f80;
    prmt.b32 low, $2, 0, 0x4140;
    prmt.b32 high, $2, 0, 0x4342;
    lop3.b32 a, low, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, low, 0x00800080, 0xc300c300, 0xea;
    lop3.b32 c, high, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 d, high, 0x00800080, 0xc300c300, 0xea;
    fma.rn.bf16x2 $0, a, one, b;
    fma.rn.bf16x2 $1, c, one, d;
}""")


@triton.jit
def _as_operand(w, dtype: tl.constexpr):
    """A tile of weights in the type of the inputs, into which int8 goes exactly."""
    if w.dtype == tl.int8 and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(INT8_TO_BFLOAT16, "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4)
    if w.dtype == tl.int8 and dtype != tl.int8:
        w = signed_byte(w.to(tl.int32), 0, 0)
    return w.to(dtype)


@triton.jit
def _scaled(acc, x_scale, scale, row, row_of_w, X_SCALE: tl.constexpr, SCALES: tl.constexpr):
    """Sums in float32, times the scales of their rows of x and of w where these have one each."""
    result = acc.to(tl.float32)
    if X_SCALE:
        result *= tl.load(x_scale + row).to(tl.float32)
    if SCALES == 1:
        result *= tl.load(scale + row_of_w).to(tl.float32)
    return result


@triton.jit
def _tile(
    x, x_scale, w, scale, residual, out,
    R: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    SCALES: tl.constexpr, X_SCALE: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, SPLITS: tl.constexpr,
    BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [R, IN] times w [OUT, IN], or w [2, OUT, IN] with SWIGLU, and what is fused with it.

    With SPLITS > 1 each program sums over a part of IN, and out gets the bare sums, [SPLITS, 1 or 2, R, OUT].
    """
    PARTS: tl.constexpr = 2 if SWIGLU else 1
    # programs that run at the same time share inputs and weights in L2: they take a band of the result, BAND tiles wide
    ROW_TILES: tl.constexpr = (R + BLOCK_ROWS - 1) // BLOCK_ROWS
    OUT_TILES: tl.constexpr = (OUT * PARTS + BLOCK_OUT - 1) // BLOCK_OUT
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    band = tile // (BAND * ROW_TILES)
    place = tile % (BAND * ROW_TILES)
    wide = tl.minimum(OUT_TILES - band * BAND, BAND)
    column = (band * BAND + place % wide) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = place // wide * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_of_w = column
    if SWIGLU:
        # eight rows of the gate and eight of up take turns: a thread then holds both sums that belong together
        part = column // 8 % 2
        column = column // 16 * 8 + column % 8
        row_of_w = part * OUT + column

    MASKED: tl.constexpr = IN % BLOCK_IN != 0
    RAGGED: tl.constexpr = R % BLOCK_ROWS != 0
    SHARE: tl.constexpr = (IN + BLOCK_IN * SPLITS - 1) // (BLOCK_IN * SPLITS) * BLOCK_IN
    inputs_of = x + row.to(tl.int64)[:, None] * IN
    row_of_w = tl.minimum(row_of_w, OUT * PARTS - 1)
    weights_of = w + row_of_w.to(tl.int64)[:, None] * IN
    sum_type: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), sum_type)
    begin = split * SHARE
    for start in range(begin, tl.minimum(begin + SHARE, IN), BLOCK_IN):
        at = start + tl.arange(0, BLOCK_IN)[None, :]
        if MASKED:
            inputs = tl.load(inputs_of + at, mask=(at < IN) & (row < R)[:, None], other=0)
        elif RAGGED:
            inputs = tl.load(inputs_of + at, mask=(row < R)[:, None], other=0)
        else:
            inputs = tl.load(inputs_of + at)
        weights = _as_operand(_load(weights_of, at, IN, MASKED, ""), inputs.dtype).T
        if SCALES > 1:
            of_group = tl.load(scale + row_of_w.to(tl.int64) * SCALES + start // GROUP).to(tl.float32)
            acc += tl.dot(inputs, weights, input_precision=PRECISION, out_dtype=sum_type) * of_group[None, :]
        else:
            acc = tl.dot(inputs, weights, acc, input_precision=PRECISION, out_dtype=sum_type)

    row, column, row_of_w = row[:, None], column[None, :], row_of_w[None, :]
    if SPLITS == 1:
        inside = (column < OUT) & (row < R)
        result = _scaled(acc, x_scale, scale, tl.minimum(row, R - 1), row_of_w, X_SCALE, SCALES)
        if SWIGLU:
            HALF: tl.constexpr = BLOCK_OUT // 2
            gate, up = result.reshape(BLOCK_ROWS, HALF // 8, 2, 8).permute(0, 1, 3, 2).split()
            result = (gate * tl.sigmoid(gate) * up).reshape(BLOCK_ROWS, HALF)
            column = (band * BAND + place % wide) * HALF + tl.arange(0, HALF)[None, :]
            inside = (column < OUT) & (row < R)
        at = row.to(tl.int64) * OUT + column
        if RESIDUAL:
            result += tl.load(residual + at, mask=inside).to(tl.float32)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    else:
        at = row.to(tl.int64) * OUT + column + split.to(tl.int64) * (PARTS * R * OUT)
        if SWIGLU:
            at += part[None, :] * (R * OUT)
        tl.store(out + at, acc, mask=(column < OUT) & (row < R))


@triton.jit
def _join(
    sums, x_scale, scale, residual, out,
    R: tl.constexpr, OUT: tl.constexpr, SPLITS: tl.constexpr,
    SCALES: tl.constexpr, X_SCALE: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bare sums of `_tile` added up, and what is fused with it."""
    BLOCKS: tl.constexpr = (OUT + BLOCK - 1) // BLOCK
    PARTS: tl.constexpr = 2 if SWIGLU else 1
    row = tl.program_id(0) // BLOCKS
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = column < OUT
    at = row.to(tl.int64) * OUT + column
    acc = tl.load(sums + at, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(sums + split * (PARTS * R * OUT) + at, mask=inside, other=0)
    result = _scaled(acc, x_scale, scale, row, tl.minimum(column, OUT - 1), X_SCALE, SCALES)
    if SWIGLU:
        acc = tl.load(sums + R * OUT + at, mask=inside, other=0)
        for split in tl.static_range(1, SPLITS):
            acc += tl.load(sums + (split * PARTS + 1) * (R * OUT) + at, mask=inside, other=0)
        up = _scaled(acc, x_scale, scale, row, tl.minimum(column, OUT - 1) + OUT, X_SCALE, SCALES)
        result = result * tl.sigmoid(result) * up
    if RESIDUAL:
        result += tl.load(residual + at, mask=inside).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def one_row_blocks(inputs, dtype, x_dtype):
    """How the kernel for one row is cut: a program's rows of w, and the chunks of 16 bytes of a row at a time."""
    chunks = triton.next_power_of_2(triton.cdiv(inputs * dtype.itemsize, 16))
    # an int8 chunk stands against 16 inputs, which as float32 are as many registers; more rows share the work on them
    rows = 4 if dtype == jnp.int8 else 2
    most = 64 if dtype == jnp.int8 and x_dtype == jnp.float32 else 256
    return {"ROWS": rows, "CHUNKS": min(most, max(32, chunks)), "num_warps": 4}


def tile_blocks(rows, outputs, inputs, x_dtype, w_dtype, grouped, memory):
    """How the kernel for several rows is cut: memory is the shared memory that a program may have, in bytes."""
    if x_dtype == jnp.float32:
        # no tensor cores: every product is an instruction
        return {"BLOCK_OUT": 64, "BLOCK_ROWS": 16 if rows <= 16 else 64, "BLOCK_IN": 32, "SPLITS": 1} | {
            "num_warps": 4, "num_stages": 3,
        }  # fmt: skip
    floats, converted = x_dtype != jnp.int8, w_dtype == jnp.int8 != x_dtype
    stages = 2 if w_dtype == jnp.float32 else 3  # the tiles of which are large
    if rows <= 64:
        tall = 16 if rows <= FEW_ROWS else 32 if rows <= 32 else 64
        wide = 128 if converted and tall == 64 and memory > 192 << 10 else 64
        more = 1 if stages == 3 and wide == 64 and (tall < 64 or memory > 128 << 10) else 0
        size = {"BLOCK_OUT": wide, "BLOCK_ROWS": tall, "BLOCK_IN": 128, "num_stages": stages + more}
    elif rows <= 128 or converted:
        large = rows > 128 and not grouped and memory > 192 << 10
        size = {"BLOCK_OUT": 64, "BLOCK_ROWS": 256 if large else 128, "BLOCK_IN": 64 if floats else 128}
    else:
        size = {"BLOCK_OUT": 128, "BLOCK_ROWS": 128, "BLOCK_IN": 64 if floats else 128}
    tiles = triton.cdiv(outputs, size["BLOCK_OUT"]) * triton.cdiv(rows, size["BLOCK_ROWS"])
    splits = max(1, min(PROGRAMS // tiles, triton.cdiv(inputs, 8 * size["BLOCK_IN"])))
    return {"SPLITS": splits, "num_warps": 4, "num_stages": stages} | size


def _launch_tiles(x, x_scale, w, scale, residual, gated, out):
    rows, outputs = x.size // x.shape[-1], w.size // w.shape[-1]
    blocks = tile_blocks(rows, outputs, x.shape[-1], x.dtype, w.dtype, _scales(w, scale) > 1, shared_memory())
    tiles = triton.cdiv(outputs, blocks["BLOCK_OUT"]) * triton.cdiv(rows, blocks["BLOCK_ROWS"])
    splits = blocks["SPLITS"]
    sums = jax.ShapeDtypeStruct((splits, rows, outputs), jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
    fused = [x if array is None else array for array in (x_scale, scale, residual)]
    flags = {
        "R": rows,
        "OUT": outputs // (2 if gated else 1),
        "SCALES": _scales(w, scale),
        "X_SCALE": x_scale is not None,
        "RESIDUAL": residual is not None,
        "SWIGLU": gated,
    }
    made = launch(
        _tile,
        x,
        fused[0],
        w,
        *fused[1:],
        out=out if splits == 1 else sums,
        grid=(tiles * splits,),
        IN=x.shape[-1],
        BAND=8,
        PRECISION="ieee",
        **flags,
        **blocks,
    )
    if splits == 1:
        return made
    block = min(JOINED, triton.next_power_of_2(flags["OUT"]))
    grid = (rows * triton.cdiv(flags["OUT"], block),)
    return launch(_join, made, *fused, out=out, grid=grid, SPLITS=splits, BLOCK=block, **flags)


def _scales(w, scale):
    """How many scales a row of w has."""
    return 0 if scale is None else scale.size // (w.size // w.shape[-1])


def matmul(x, w, scale=None, norm=None, eps=0.0, residual=None, gated=False, dtype=jnp.float32):
    """x [..., in] times w [*out, in] transposed, in dtype: [..., *out].

    w is float, or int8 with scale [*out] (one an output channel) or [*out, groups] (one a group of 128 inputs).  With
    norm [in], x is first replaced by its RMSNorm with eps.  With gated, w is [2, F, in], and the result is
    silu(gate) * up [..., F].  residual is added to the result, in its shape.  Sums are in float32.
    """
    out = _result(x, w, gated, dtype)
    if x.size > x.shape[-1]:
        if norm is not None:
            x = rms_norm(x, norm, eps)  # every program would have to read whole rows
        return _launch_tiles(x, None, w, scale, residual, gated, out)
    blocks = one_row_blocks(x.shape[-1], w.dtype, x.dtype)
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
    return _launch_tiles(x, x_scale, w, scale, residual, gated, _result(x, w, gated, dtype))


def _result(x, w, gated, dtype):
    return jax.ShapeDtypeStruct((*x.shape[:-1], *w.shape[1 if gated else 0 : -1]), dtype)

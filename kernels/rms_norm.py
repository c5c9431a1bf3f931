"""RMSNorm as a Triton kernel, with and without the residual that is added before it."""

import jax
import triton
import triton.language as tl

from jaxllm.kernels.launch import launch, row_tile


@triton.jit
def _offsets(D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    return row[:, None] * D + column, column


@triton.jit
def _normed(values, gain, eps, D: tl.constexpr):
    values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / D + eps)
    return values * scale[:, None] * gain.to(tl.float32)


@triton.jit
def _rms_norm(x, weight, out, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at, column = _offsets(D, ROWS, BLOCK)
    values = tl.load(x + at, mask=column < D, other=0.0)
    gain = tl.load(weight + column, mask=column < D, other=0.0)  # before the sum, so that the loads overlap
    tl.store(out + at, _normed(values, gain, eps, D).to(out.dtype.element_ty), mask=column < D)


@triton.jit
def _add_rms_norm(x, delta, weight, total, out, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at, column = _offsets(D, ROWS, BLOCK)
    values = tl.load(x + at, mask=column < D, other=0.0)
    added = tl.load(delta + at, mask=column < D, other=0.0).to(values.dtype)
    values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
    gain = tl.load(weight + column, mask=column < D, other=0.0)
    tl.store(total + at, values, mask=column < D)
    tl.store(out + at, _normed(values, gain, eps, D).to(out.dtype.element_ty), mask=column < D)


def rms_norm(x, weight, eps):
    """x [..., D] over its root mean square, times weight [D]; in x's type.  Zhang and Sennrich 2019, eq. 4."""
    return _launch(_rms_norm, x, weight, out=jax.ShapeDtypeStruct(x.shape, x.dtype), eps=eps)


def add_rms_norm(x, delta, weight, eps):
    """x + delta [..., D] in x's type, and the rms_norm of that sum, as it was rounded."""
    form = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _launch(_add_rms_norm, x, delta, weight, out=(form, form), eps=eps)


def _launch(kernel, x, *arrays, out, eps):
    width = x.shape[-1]
    rows, block, warps = row_tile(x.size // width, width)
    return launch(
        kernel,
        x,
        *arrays,
        out=out,
        grid=(x.size // width // rows,),
        num_warps=warps,
        eps=eps,
        D=width,
        ROWS=rows,
        BLOCK=block,
    )

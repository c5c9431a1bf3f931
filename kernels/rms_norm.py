"""RMSNorm as a Triton kernel, with and without the residual that is added before it."""

import jax
import triton
import triton.language as tl

from jaxllm.kernels.launch import launch


@triton.jit
def _kernel(x, weight, out, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * D + at, mask=at < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / D + eps)
    values = values * scale * tl.load(weight + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + at, values.to(out.dtype.element_ty), mask=at < D)


def triton_rms_norm(x, weight, eps):
    """As `reference.rms_norm`: x [..., D] over its root mean square, times weight [D]; in x's type."""
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    return launch(
        _kernel,
        x,
        weight,
        out=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.size // width,),
        num_warps=min(16, max(1, block // 512)),
        eps=eps,
        D=width,
        BLOCK=block,
    )

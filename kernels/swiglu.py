"""SwiGLU's elementwise half as a Triton kernel."""

import jax
import triton
import triton.language as tl

from jaxllm.kernels.launch import launch


def _tile(rows, width):
    """The columns that a program takes, and its number of warps."""
    few = rows * width < 1 << 20  # too little to fill a GPU: smaller programs, and more of them
    block = min(256 if few else 1024, triton.next_power_of_2(width))
    return block, max(1, block // 256)


@triton.jit
def _swiglu(gate_up, out, F: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * F + column, mask=column < F).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=column < F).to(tl.float32)
    tl.store(out + row * F + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=column < F)


def swiglu(gate_up):
    """silu(gate) * up, elementwise, of gate_up [..., 2, F]: [..., F] in its type.  Shazeer 2020, eq. 6."""
    *batch, _, width = gate_up.shape
    rows = gate_up.size // (2 * width)
    block, warps = _tile(rows, width)
    return launch(
        _swiglu,
        gate_up,
        out=jax.ShapeDtypeStruct((*batch, width), gate_up.dtype),
        grid=(rows * triton.cdiv(width, block),),
        num_warps=warps,
        F=width,
        BLOCK=block,
    )

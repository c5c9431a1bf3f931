"""How a Triton kernel is called from jax: the one place that needs jax_triton, which only GPU machines have."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend
import triton


def launch(
    kernel: Callable,
    *arrays,
    out: Any,
    grid: Sequence[int],
    aliases: Mapping[int, int] | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants,
):
    """Run a Triton kernel over `grid` programs: the arrays that it writes, in the form of out.

    The kernel gets a pointer for each of arrays, then one for each leaf of out (ShapeDtypeStructs), then constants by
    name: numbers that are compiled in.  aliases maps the number of an array to the leaf of out that is the same
    buffer, updated in place; such a leaf has no pointer of its own.
    """
    import jax_triton

    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_type=out,
        grid=tuple(grid),
        input_output_aliases=dict(aliases or {}),
        num_warps=num_warps,
        num_stages=num_stages,
        **constants,
    )


def shared_memory() -> int:
    """Bytes of shared memory that a program may have on JAX's default device, or on any that there is a kernel for."""
    capability = getattr(jax.extend.backend.get_default_device(), "compute_capability", None)
    return {"8.0": 163, "9.0": 227, "10.0": 227}.get(capability, 99) << 10


def row_tile(rows: int, width: int) -> tuple[int, int, int]:
    """For a kernel that holds whole rows: how many rows a program takes, the columns of its tile, and its warps."""
    block = triton.next_power_of_2(width)
    tall = math.gcd(rows, max(1, 2048 // block))  # divides rows, so that rows need no mask
    few = rows // tall < 256  # programs that do not fill a GPU: more threads for each
    warps = tall * block // (32 * (8 if few else 16))
    return tall, block, min(32, max(1, warps))

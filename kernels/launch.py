"""How a Triton kernel is called from jax: the one place that needs jax_triton, which only GPU machines have."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


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

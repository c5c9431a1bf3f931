"""How a Triton kernel is called from jax: the one place that needs jax_triton, which only GPU machines have."""

import hashlib
import importlib.metadata
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

import jax
import jax.extend
import triton
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction


def launch(
    kernel: Callable,
    *arrays,
    out: Any,
    grid: Sequence[int],
    aliases: Mapping[int, int] | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
    backend_options: Mapping[str, Any] | None = None,
    **constants,
):
    """Run a Triton or Gluon kernel over `grid` programs: the arrays that it writes, in the form of out.

    The kernel gets a pointer for each of arrays, and a tuple of them for a tuple, then one for each leaf of out
    (ShapeDtypeStructs), then constants by name: numbers that are compiled in.  aliases maps the number of an array,
    those in tuples counted one by one, to the leaf of out that is the same buffer, updated in place; such leaves come
    last in out, and have no pointers of their own.  backend_options are more of the compiler, by name.
    """
    import jax_triton

    _keep_compiled(getattr(jax_triton, "triton_lib", None))  # tests have a jax_triton of their own, without it
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_type=out,
        grid=tuple(grid),
        input_output_aliases=dict(aliases or {}),
        num_warps=num_warps,
        num_stages=num_stages,
        **({"backend_options": dict(backend_options)} if backend_options else {}),
        **constants,
    )


@cache
def _keep_compiled(library):
    """Have jax_triton.triton_lib keep the kernels that it makes beside JAX's compiled programs.

    Kernels are made before JAX can look for the program in its cache, and jax_triton 0.4 does so in every process: some
    10 s for a model.
    """
    functions = getattr(library, "TritonFunction", None)
    if functions is not None:
        versions = tuple(map(importlib.metadata.version, ("triton", "jax-triton")))
        functions._compile_kernel = partialmethod(_kernel, library, functions._compile_kernel, versions)


def _kernel(function, library, make, versions, spec, target, backend, backend_options):
    """What make makes of a TritonFunction: (TritonKernel, IR, options, CompilationResult), from JAX's cache folder.

    What is not there yet is kept there.  Its name is a hash of the sources, as Triton's own cache has it: from the IR
    it could only be told after most of the work.
    """
    folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        return make(function, spec, target, backend, backend_options)
    options = backend.parse_options(backend_options)
    source = GluonASTSource if isinstance(function.fn, GluonJITFunction) else ASTSource
    source = source(function.fn, spec.signature, spec.constants, spec.attrs)
    key = hashlib.sha256("\0".join([source.hash(), options.hash(), str(target), *versions]).encode()).hexdigest()
    file = Path(folder) / f"triton-{key}.json"
    with suppress(OSError, ValueError, TypeError):  # not there, or damaged
        ir, result = json.loads(file.read_bytes())
        result = library.CompilationResult(**result)
        warps, programs = backend_options["num_warps"], backend_options["num_ctas"]
        arguments = result.name, warps, programs, result.shared_mem_bytes, result.binary, ir, target.arch
        return library.triton_kernel_call_lib.TritonKernel(*arguments), ir, options, result
    made = make(function, spec, target, backend, backend_options)
    _, ir, _, result = made
    if result.global_scratch_size is not None:  # such a kernel has more arguments
        return made
    # what is left out is for who debugs the compiler; the IR is a part of the program that JAX has a cache for
    text = json.dumps([ir, {**vars(result), "ttgir": "", "llir": ""}]).encode()
    with suppress(OSError):  # as JAX does where its cache cannot be written
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as new:
            new.write(text)
        os.replace(new.name, file)
    return made


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

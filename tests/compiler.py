"""Triton kernels compiled for a GPU that is not there: a `jax_triton` for tests, which compiles what it should run.

Not in a process with tests/interpreter.py.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

_TYPES = {
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "i8", "int32": "i32", "uint32": "u32",
    "bool": "i1",
}  # fmt: skip
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_for(capability: int, function, *arguments):
    """Compile each kernel that function(*arguments) launches, for compute capability 80 or the like.

    arguments are ShapeDtypeStructs and constants.  A list of records: name, asm (a dict with "ptx" and "cubin"),
    registers and spills (bytes of local memory) a thread, shared (bytes of shared memory).
    """
    found = []

    def triton_call(
        *arrays,
        kernel,
        out_type,
        grid,
        input_output_aliases=None,
        num_warps=4,
        num_stages=2,
        backend_options=None,
        **constants,
    ):
        same = dict(input_output_aliases or {})
        leaves = jax.tree.leaves(out_type)
        fresh = [leaf for number, leaf in enumerate(leaves) if number not in same.values()]
        pointers = [
            jax.tree.map(lambda array: f"*{_TYPES[jnp.dtype(array.dtype).name]}", array) for array in (*arrays, *fresh)
        ]
        names = kernel.arg_names
        constexprs = {(names.index(name),): value for name, value in constants.items()}
        signature = dict.fromkeys(names, "constexpr") | dict(zip(names, pointers, strict=False))
        assert len(pointers) + len(constants) == len(names), (names, pointers, constants)
        paths = [tuple(key.idx for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(pointers)]
        attributes = {path: [["tt.divisibility", 16]] for path in paths}
        if isinstance(kernel, GluonJITFunction):
            source = GluonASTSource(kernel, signature, constexprs, attributes)
            # through the passes for Triton's own language, as jax_triton has it
            source.language, source.ext = Language.TRITON, "ttir"
        else:
            source = ASTSource(kernel, signature, constexprs, attributes)
        target = GPUTarget("cuda", capability, 32)
        options = {"num_warps": num_warps, "num_stages": num_stages, **(backend_options or {})}
        made = triton.compile(source, target=target, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [_BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        found.append(
            SimpleNamespace(
                name=kernel.__name__,
                asm=made.asm,
                registers=numbers["REG"],
                spills=numbers["LOCAL"] + numbers["STACK"],
                shared=made.metadata.shared,
            )
        )
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out_type)

    sys.modules["jax_triton"] = SimpleNamespace(triton_call=triton_call)
    # a function of its own: what was traced before would not be traced again
    jax.eval_shape(lambda *arguments: function(*arguments), *arguments)
    return found

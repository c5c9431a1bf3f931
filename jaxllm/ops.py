"""The operator registry: which implementations an op has, and the functions that the model calls.

The type of a weight decides how it is multiplied; a name decides which implementation does it.
"""

import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.kernels import reference
from jaxllm.tensor import Array, QTensor

# op -> implementation -> function.  "xla" is the specification: it runs everywhere and is differentiable.
IMPLEMENTATIONS = {
    "rms_norm": {"xla": reference.rms_norm},
    "matmul": {"xla": reference.matmul},
    "int8_matmul": {"xla": reference.int8_matmul},
    "rope": {"xla": reference.rope},
    "attention": {"xla": reference.attention},
    "swiglu": {"xla": reference.swiglu},
}

rms_norm = IMPLEMENTATIONS["rms_norm"]["xla"]
rope = IMPLEMENTATIONS["rope"]["xla"]
attention = IMPLEMENTATIONS["attention"]["xla"]
swiglu = IMPLEMENTATIONS["swiglu"]["xla"]


def matmul(x, w: Array):
    """x [..., in] times w [*out, in] transposed: float32 [..., *out], whether w is float or int8."""
    if isinstance(w, QTensor):
        return IMPLEMENTATIONS["int8_matmul"]["xla"](x, w.values, w.scale)
    return IMPLEMENTATIONS["matmul"]["xla"](x, w)


def embed(tokens, table: Array, dtype):
    """Rows of table [V, D] for tokens int32 [...]: [..., D] in dtype."""
    if isinstance(table, QTensor):
        return (table.values[tokens].astype(jnp.float32) * table.scale[tokens][..., None]).astype(dtype)
    return table[tokens].astype(dtype)


def check_implementations(spec: str) -> None:
    """Raise InputError unless spec is `auto`, the name of an implementation, or `OP=IMPL,...`, all of them there."""
    names = sorted({name for table in IMPLEMENTATIONS.values() for name in table})
    for part in spec.split(","):
        op, _, name = part.rpartition("=")
        if op and op not in IMPLEMENTATIONS:
            raise InputError(f"there is no op called {op!r}; there are {', '.join(IMPLEMENTATIONS)}")
        if name not in ("auto", *(IMPLEMENTATIONS[op] if op else names)):
            raise InputError(f"implementation {name!r} is not in this jaxllm; there are auto, {', '.join(names)}")

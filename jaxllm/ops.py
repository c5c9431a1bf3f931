"""The operator registry: which implementations an op has, and the functions that the model calls.

The type of a weight decides how it is multiplied; a name decides which implementation does it.
"""

from dataclasses import replace

from jaxllm.errors import InputError
from jaxllm.kernels import reference
from jaxllm.quantize import dequantize, quantize
from jaxllm.tensor import Array, QTensor

# op -> implementation -> function.  "xla" is the specification: it runs everywhere and is differentiable,
# but for the rounding of activations in front of w8a8_matmul.
IMPLEMENTATIONS = {
    "rms_norm": {"xla": reference.rms_norm},
    "matmul": {"xla": reference.matmul},
    "int8_matmul": {"xla": reference.int8_matmul},
    "w8a8_matmul": {"xla": reference.w8a8_matmul},
    "rope": {"xla": reference.rope},
    "attention": {"xla": reference.attention},
    "swiglu": {"xla": reference.swiglu},
}


def rms_norm(x, weight, eps):
    """x [..., D] over its root mean square, times weight [D]; in x's type."""
    return IMPLEMENTATIONS["rms_norm"]["xla"](x, weight, eps)


def rope(x, cos, sin):
    """Rotate each pair (i, i + H/2) of x [B, T, ..., H] by an angle, given as cos and sin [B, T, H/2]; in x's type."""
    return IMPLEMENTATIONS["rope"]["xla"](x, cos, sin)


def attention(q, k: Array, v: Array, positions):
    """Attention of q [B, T, K, G, H], at positions [B, T], over k and v [B, K, S, H], float or int8; in q's type."""
    implementation = IMPLEMENTATIONS["attention"]["xla"]
    if isinstance(k, QTensor):
        return implementation(q, k.values, v.values, positions, k.scale, v.scale)
    return implementation(q, k, v, positions)


def swiglu(gate, up):
    """silu(gate) * up, elementwise; in gate's type."""
    return IMPLEMENTATIONS["swiglu"]["xla"](gate, up)


def matmul(x, w: Array):
    """x [..., in] times w [*out, in] transposed: float32 [..., *out], whether w is float or int8."""
    if isinstance(w, QTensor) and w.int8_inputs:
        q = quantize(x, "w8a8")
        return IMPLEMENTATIONS["w8a8_matmul"]["xla"](q.values, q.scale, w.values, w.scale)
    if isinstance(w, QTensor):
        return IMPLEMENTATIONS["int8_matmul"]["xla"](x, w.values, w.scale)
    return IMPLEMENTATIONS["matmul"]["xla"](x, w)


def embed(tokens, table: Array, dtype):
    """Rows of table [V, D] for tokens int32 [...]: [..., D] in dtype."""
    if isinstance(table, QTensor):
        return dequantize(replace(table, values=table.values[tokens], scale=table.scale[tokens]), dtype)
    return table[tokens].astype(dtype)


def check_implementations(spec: str) -> None:
    """Raise InputError unless spec is `auto`, the name of an implementation, or `OP=IMPL,...`, all of them there."""
    for part in spec.split(","):
        op, equals, name = part.rpartition("=")
        if equals and op not in IMPLEMENTATIONS:
            raise InputError(f"there is no op called {op!r}; there are {', '.join(IMPLEMENTATIONS)}")
        names = {"auto"}.union(*([IMPLEMENTATIONS[op]] if equals else IMPLEMENTATIONS.values()))
        if name not in names:
            raise InputError(f"implementation {name!r} is not in this jaxllm; there are {', '.join(sorted(names))}")

"""The operator registry: which implementations an op has, what each supports, and the functions that the model calls.

The type of a weight decides how it is multiplied; a name decides which implementation does it: of one op, "triton",
or of several, "attention=xla,matmul=triton", and of those that are not named the first in its table that supports the
call.  `python -m jaxllm.ops` prints the tables.  To add an implementation of your own:

    ops.IMPLEMENTATIONS["rms_norm"]["mine"] = ops.Implementation(my_rms_norm)  # the arguments of reference.rms_norm
    config = dataclasses.replace(config, impl="rms_norm=mine")
"""

import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain

import jax
import jax.extend
import jax.numpy as jnp

from jaxllm.errors import ArgumentParser, InputError, run_command
from jaxllm.kernels import reference
from jaxllm.quantize import dequantize, quantize
from jaxllm.tensor import Array, QTensor


@dataclass(frozen=True)
class Implementation:
    """A way to do an op, and the calls that it supports.

    function takes the arguments of the op's specification in `jaxllm.kernels.reference`, or is "module:name" of one
    that is imported when it is first called; None, of `decode_step`, stands for the other ops one by one.  It runs on
    platform (jax's name; None: on all), on GPUs from a compute capability on, where packages are installed; dtypes are
    those of the first argument, and limits the other facts of a call, by name (None and nothing: all).  auto lists the
    calls for which it was measured to be the fastest, each as allowed facts, of which "dtype" is one (None: all that it
    supports).  One that is not differentiable is differentiated and batched through the specification.
    """

    function: Callable | str | None
    platform: str | None = None
    capability: tuple[int, int] = (0, 0)
    packages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] | None = None
    limits: Mapping[str, Collection] = field(default_factory=dict)
    auto: tuple[Mapping[str, Collection], ...] | None = None
    differentiable: bool = True


def _triton(function, **more):
    """A Triton kernel of `jaxllm.kernels`."""
    more = dict(capability=(8, 0), dtypes=("float32", "bfloat16", "float16")) | more
    packages = ("triton", "jax_triton")
    return Implementation(f"jaxllm.kernels.{function}", "gpu", packages=packages, differentiable=False, **more)


HEAD_DIMS = (64, 80, 96, 128)
HALF = ("bfloat16", "float16")
WIDE = 2**18  # the widest row of logits

# op -> implementation, in the order in which "auto" tries them.  "xla" is the specification: it runs everywhere and is
# differentiable, but for the rounding of activations in front of w8a8_matmul.  On GPUs it multiplies by cuBLAS.
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    "rms_norm": {
        "triton": _triton("rms_norm:rms_norm", limits={"width": range(1, 16385)}),
        "xla": Implementation(reference.rms_norm),
    },
    "add_rms_norm": {
        "triton": _triton("rms_norm:add_rms_norm", limits={"width": range(1, 16385)}),
        "xla": Implementation(reference.add_rms_norm),
    },
    "softmax": {
        "triton": _triton("softmax:softmax", limits={"width": range(1, WIDE + 1)}),
        "xla": Implementation(reference.softmax),
    },
    "swiglu": {
        "triton": _triton("swiglu:swiglu"),
        "xla": Implementation(reference.swiglu),
    },
    "rope": {
        "triton": _triton("rope:rope"),
        "xla": Implementation(reference.rope),
    },
    "rope_store": {
        "triton": _triton("rope:rope_store"),
        "xla": Implementation(reference.rope_store),
    },
    "attention": {
        "mosaic": Implementation(
            # jax_triton takes no part in it, but comes with a jax that is new enough
            "jaxllm.kernels.flash_attention:attention", "gpu", capability=(9, 0), packages=("jax_triton",), dtypes=HALF,
            limits={
                "gpu": ("9.0",), "cache": HALF, "head_dim": (64, 128), "window": (None,),
                "tokens": range(8, 2**20, 8), "slots": range(8, 2**24, 8),
            },
            auto=(),  # a whole model with it has not been measured
            differentiable=False,
        ),
        "triton": _triton("attention:attention", limits={"head_dim": HEAD_DIMS, "window": (None,)}),
        "xla": Implementation(reference.attention),
    },
    "matmul": {
        "triton": _triton("matmul:matmul", auto=({"rows": (1,)}, {"dtype": HALF, "rows": range(1, 129)})),
        "xla": Implementation(reference.matmul),
    },
    "int8_matmul": {
        "triton": _triton("matmul:matmul", auto=({"rows": range(1, 17)}, {"dtype": HALF, "rows": range(1, 513)})),
        "xla": Implementation(reference.int8_matmul),
    },
    "w8a8_matmul": {
        "triton": _triton("matmul:w8a8_matmul", dtypes=("int8",)),
        "xla": Implementation(reference.w8a8_matmul),
    },
    "restrict": {
        "triton": _triton("sample:restrict", dtypes=("float32",), limits={"width": range(1, WIDE + 1)}),
        "xla": Implementation(reference.restrict),
    },
    "decode_step": {
        "gluon": _triton(
            "decode_step:decode_step", capability=(9, 0), dtypes=("float32", "bfloat16"),
            limits={
                "gpu": ("9.0",), "multiprocessors": range(114, 1025),  # all of a Hopper card's, not a part of it
                "weights": ("float32", "bfloat16", "int8"), "cache": ("float32", "bfloat16"),
                "head_dim": (64, 128), "width": range(16, 8193, 16), "ffn_width": range(16, 28673, 16),
                "rows": range(1, 9), "inputs": range(16, 49153),
                "window": (None,), "attention_bias": (False,), "qk_norm": (False,),
            },
            # with more slots, query heads that share k and v read them once each, which one by one they do not
            auto=({"slots": range(1, 6145)},),
        ),
        "xla": Implementation(None),
    },
}  # fmt: skip


def rms_norm(x, weight, eps, impl="auto"):
    """x [..., D] over its root mean square, times weight [D]; in x's type."""
    return _call("rms_norm", impl, {"width": x.shape[-1]}, {"eps": eps}, x, weight)


def add_rms_norm(x, delta, weight, eps, impl="auto"):
    """x + delta [..., D] in x's type, and the rms_norm of that sum."""
    return _call("add_rms_norm", impl, {"width": x.shape[-1]}, {"eps": eps}, x, delta, weight)


def softmax(x, impl="auto"):
    """exp(x) over its sum along the last axis of x [..., n]; in x's type."""
    return _call("softmax", impl, {"width": x.shape[-1]}, {}, x)


def swiglu(gate_up, impl="auto"):
    """silu(gate) * up, elementwise, of gate_up [..., 2, F]: [..., F] in its type."""
    return _call("swiglu", impl, {}, {}, gate_up)


def rope(x, cos, sin, impl="auto"):
    """Rotate each pair (i, i + H/2) of x [B, T, ..., H] by an angle, given as cos and sin [B, T, H/2]; in x's type."""
    return _call("rope", impl, {"head_dim": x.shape[-1]}, {}, x, cos, sin)


def rope_store(qkv, cos, sin, positions, k: Array, v: Array, impl="auto"):
    """Rotate q and k of qkv [B, T, K, G+2, H] and write k and v into a cache: q [B, T, K, G, H], and the cache's k, v.

    The cache k and v [B, K, S, H] is float or int8; token t of row b goes to slot positions[b, t], and nowhere if there
    is no such slot.
    """
    facts = {"head_dim": qkv.shape[-1]}
    if isinstance(k, QTensor):
        cache = (k.values, v.values, k.scale, v.scale)
        q, k8, v8, k_scale, v_scale = _call("rope_store", impl, facts, {}, qkv, cos, sin, positions, *cache)
        return q, QTensor(k8, k_scale), QTensor(v8, v_scale)
    return _call("rope_store", impl, facts, {}, qkv, cos, sin, positions, k, v)


def attention(q, k: Array, v: Array, positions, impl="auto", window=None):
    """Attention of q [B, T, K, G, H], at positions [B, T], over k and v [B, K, S, H], float or int8; in q's type.

    A query sees the slots up to its position, with a window only the last so many of them.
    """
    facts = {"cache": _kind(k), "head_dim": q.shape[-1], "tokens": q.shape[1], "slots": k.shape[2], "window": window}
    options = {} if window is None else {"window": window}
    if isinstance(k, QTensor):
        return _call("attention", impl, facts, options, q, k.values, v.values, positions, k.scale, v.scale)
    return _call("attention", impl, facts, options, q, k, v, positions)


def matmul(x, w: Array, norm=None, residual=None, eps=0.0, gated=False, dtype=jnp.float32, impl="auto"):
    """x [..., in] times w [*out, in] transposed, whether w is float or int8: [..., *out] in dtype.

    With norm [in], rms_norm(x, norm, eps) takes the place of x.  With gated, w is [2, F, in] and what is returned is
    swiglu of the product, [..., F].  residual [..., *out] is added at last.
    """
    facts = {"rows": x.size // x.shape[-1], "width": x.shape[-1]}
    options = {"gated": gated, "dtype": jnp.dtype(dtype)}
    if isinstance(w, QTensor) and w.int8_inputs:
        if norm is not None:
            x = rms_norm(x, norm, eps, impl)
        q = quantize(x, "w8a8")
        return _call("w8a8_matmul", impl, facts, options, q.values, q.scale, w.values, w.scale, residual=residual)
    options["eps"] = eps
    if isinstance(w, QTensor):
        facts["grouped"] = _kind(w) == "int8-g128"
        return _call("int8_matmul", impl, facts, options, x, w.values, w.scale, norm=norm, residual=residual)
    return _call("matmul", impl, facts, options, x, w, norm=norm, residual=residual)


def restrict(logits, top_k, top_p, impl="auto"):
    """Logits float32 [B, V] with those outside top_k int32 [B] (0: off) and top_p float32 [B] (1: off) at -inf."""
    return _call("restrict", impl, {"width": logits.shape[-1]}, {}, logits, top_k, top_p)


def decode_step(
    one_by_one, x, cos, sin, positions, layers, keys, values, norm, output: Array, eps, impl="auto", **facts
):
    """Logits float32 [B, V] behind one token of each of B rows, and the L caches k and v: a whole model as one op.

    x [B, 1, D] are the tokens' embeddings, cos, sin and positions are as in `rope_store`; layers are L `model.Layer`s,
    keys and values their caches [B, K, S, H], norm [D] and output [V, D] what follows.  one_by_one is the
    specification: a function of x to output that returns the same by way of the other ops, which is also what happens
    where impl names an implementation of another op.  facts are more to choose by: window, attention_bias and qk_norm,
    of the config.  An implementation takes arrays: x, cos, sin, positions, layers (attn_norm, wqkv, wo, ffn_norm,
    w_gate_up, w_down, scales of the four matrices or None, k, v), norm, output, output_scale or None, and eps; norms
    are in x's type.
    """
    arguments = x, cos, sin, positions, tuple(layers), tuple(keys), tuple(values), norm, output
    others = IMPLEMENTATIONS.keys() - {"decode_step", "restrict"}
    if _wanted(impl, "decode_step") == "auto" and any(_wanted(impl, op) != "auto" for op in others):
        return one_by_one(*arguments)
    weights = " and ".join(sorted({_kind(w) for w in (output, *chain(*map(_matrices, layers)))}))
    if weights in ("float32", "bfloat16", "float16") and weights != x.dtype.name:
        weights += f" for {x.dtype.name}"
    facts |= {
        "weights": weights,
        "cache": _kind(keys[0]),
        "slots": len(x) * keys[0].shape[2],
        "head_dim": keys[0].shape[3],
        "width": x.shape[-1],
        "ffn_width": layers[0].w_down.shape[-1],
        "rows": len(x) if len(x) == 1 or x.dtype == jnp.bfloat16 else f"{len(x)} of {x.dtype.name}",
        "inputs": len(x) * max(x.shape[-1], layers[0].wo.shape[-1]),  # of a product, of all rows
    }
    chosen = choose("decode_step", impl, x.dtype, facts)
    if chosen.function is None:
        return one_by_one(*arguments)

    def whole(x, cos, sin, positions, layers, keys, values, norm, output):
        arrays = []
        for layer, k, v in zip(layers, keys, values, strict=True):
            (wqkv, wo, w_gate_up, w_down), scales = zip(*map(_numbers, _matrices(layer)), strict=True)
            norms = layer.attn_norm.astype(x.dtype), layer.ffn_norm.astype(x.dtype)
            scales = None if scales[0] is None else scales
            arrays.append((norms[0], wqkv, wo, norms[1], w_gate_up, w_down, scales, k, v))
        norm = norm.astype(x.dtype)
        function = _imported(chosen.function)
        return function(x, cos, sin, positions, tuple(arrays), norm, *_numbers(output), eps=eps)

    return (whole if chosen.differentiable else _with_rules_of(one_by_one, whole))(*arguments)


def _matrices(layer):
    return layer.wqkv, layer.wo, layer.w_gate_up, layer.w_down


def _kind(w):
    """What numbers a weight or a cache holds, as one word."""
    if not isinstance(w, QTensor):
        return w.dtype.name
    return "w8a8" if w.int8_inputs else "int8-g128" if w.scale.ndim == w.values.ndim else "int8"


def _numbers(w):
    """The numbers of a weight, and its scale or None."""
    return (w.values, w.scale) if isinstance(w, QTensor) else (w, None)


def embed(tokens, table: Array, dtype):
    """Rows of table [V, D] for tokens int32 [...]: [..., D] in dtype."""
    if isinstance(table, QTensor):
        return dequantize(replace(table, values=table.values[tokens], scale=table.scale[tokens]), dtype)
    return table[tokens].astype(dtype)


def _call(op, impl, facts, options, *arrays, **named):
    """Do an op: with its arrays, some of which have names, and with options, which are no arrays."""
    chosen = choose(op, impl, arrays[0].dtype, facts)
    function = partial(_imported(chosen.function), **options)
    if not chosen.differentiable:
        function = _with_rules_of(partial(IMPLEMENTATIONS[op]["xla"].function, **options), function)
    return function(*arrays, **named)


@cache
def _imported(function):
    if callable(function):
        return function
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)


def _with_rules_of(specification, kernel):
    """The kernel, differentiated and batched (jax.grad, jax.vmap) as the specification is."""

    @jax.custom_batching.custom_vmap
    def batched(arrays, named):
        return kernel(*arrays, **named)

    @batched.def_vmap
    def _(size, in_batched, arrays, named):
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
        out = jax.vmap(lambda arrays, named: specification(*arrays, **named), in_axes=tuple(axes), axis_size=size)(
            arrays, named
        )
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_vjp
    def differentiable(arrays, named):
        return batched(arrays, named)

    def forward(arrays, named):
        return batched(arrays, named), (arrays, named)

    def backward(kept, cotangent):
        _, pull = jax.vjp(lambda arrays, named: specification(*arrays, **named), *kept)
        return pull(cotangent)

    differentiable.defvjp(forward, backward)
    return lambda *arrays, **named: differentiable(arrays, named)


def choose(op: str, impl: str, dtype, facts: Mapping[str, int]) -> Implementation:
    """The Implementation that impl (as in `check_implementations`) means for a call of op on JAX's default device.

    dtype is that of the first argument, facts are what limits may name besides the device's: gpu, its compute
    capability, and multiprocessors.  Raises InputError when one was asked for by name that does not support the call.
    """
    device = jax.extend.backend.get_default_device()
    facts = {
        "gpu": getattr(device, "compute_capability", None),
        "multiprocessors": getattr(device, "core_count", None),
        **facts,
    }
    name = _wanted(impl, op)
    if name != "auto":
        reason = objection(IMPLEMENTATIONS[op][name], dtype, facts)
        if reason:
            raise InputError(f"{op}: {name} cannot do this: {reason}; choose another, or auto")
        return IMPLEMENTATIONS[op][name]
    facts = {**facts, "dtype": jnp.dtype(dtype).name}
    table = IMPLEMENTATIONS[op].values()
    return next(each for each in table if not objection(each, dtype, facts) and _is_fastest(each, facts))


def _is_fastest(implementation, facts):
    """Whether auto takes an implementation for a call that it supports."""
    calls = implementation.auto
    return calls is None or any(all(facts[fact] in allowed for fact, allowed in call.items()) for call in calls)


def _wanted(impl, op):
    """The name of the implementation that impl asks for, of one op; or auto."""
    wanted = "auto"
    for named, name in _parts(impl):
        if named == op:
            return name
        if named is None and name in IMPLEMENTATIONS[op]:
            wanted = name
    return wanted


def _parts(impl):
    """The parts of impl as (op, name), op None for all; raises InputError for one that does not exist."""
    parts = []
    for part in impl.split(","):
        op, equals, name = part.rpartition("=")
        if equals and op not in IMPLEMENTATIONS:
            raise InputError(f"there is no op called {op!r}; there are {', '.join(IMPLEMENTATIONS)}")
        names = {"auto"}.union(*([IMPLEMENTATIONS[op]] if equals else IMPLEMENTATIONS.values()))
        if name not in names:
            raise InputError(f"implementation {name!r} is not in this jaxllm; there are {', '.join(sorted(names))}")
        parts.append((op if equals else None, name))
    return parts


def objection(implementation: Implementation, dtype=None, facts: Mapping[str, int] | None = None) -> str | None:
    """Why an implementation cannot do a call on JAX's default device, or None; without dtype and facts, any call."""
    device = jax.extend.backend.get_default_device()
    if implementation.platform not in (None, device.platform):
        return f"it needs a {implementation.platform}, and JAX's default device is a {device.platform}"
    for package in implementation.packages:
        if find_spec(package) is None:
            old = " (it needs Python 3.12)" if sys.version_info < (3, 12) else ""
            return f"it needs the package {package}, which is not installed{old}"
    if implementation.capability > (0, 0):
        if not re.fullmatch(r"\d+\.\d+", device.compute_capability):
            return f"it needs an NVIDIA GPU, and JAX's default device is {device.device_kind}"
        capability = tuple(map(int, device.compute_capability.split(".")))
        if capability < implementation.capability:
            least = ".".join(map(str, implementation.capability))
            return f"it needs compute capability {least}, and this GPU has {device.compute_capability}"
    if dtype is not None and implementation.dtypes and jnp.dtype(dtype).name not in implementation.dtypes:
        return f"it takes {', '.join(implementation.dtypes)}, not {jnp.dtype(dtype).name}"
    for fact, allowed in implementation.limits.items():
        if facts is not None and facts[fact] not in allowed:
            return f"it takes {fact} {_allowed(allowed)}, not {facts[fact]}"
    return None


def _allowed(values):
    if not isinstance(values, range):
        return ", ".join(map(str, values))
    return f"{values[0]} to {values[-1]}" + (f" in steps of {values.step}" if values.step > 1 else "")


def check_implementations(impl: str) -> None:
    """Raise InputError unless impl can be used: `auto`, the name of an implementation, or `OP=NAME,...`.

    A name without an op stands for all ops that have one of that name.
    """
    for op, name in _parts(impl):
        for table in [IMPLEMENTATIONS[op]] if op else IMPLEMENTATIONS.values():
            reason = objection(table[name]) if name in table else None
            if reason:
                raise InputError(f"implementation {name!r} cannot be used here: {reason}; choose another, or auto")


def _supports(implementation):
    """In words: what an implementation supports."""
    parts = [implementation.platform or "any device"]
    if implementation.function is None:
        parts.append("the other ops, one by one")
    if implementation.capability > (0, 0):
        parts[0] += f" from compute capability {'.'.join(map(str, implementation.capability))}"
    if implementation.dtypes:
        parts.append(" ".join(implementation.dtypes))
    return "; ".join([*parts, *_facts(implementation.limits)])


def _facts(allowed):
    return [f"{fact} {_allowed(values)}" for fact, values in allowed.items()]


def main(argv=None):
    """Print each op's implementations: what they support, and which one auto takes here, and why not the others."""
    ArgumentParser(prog="python -m jaxllm.ops", description=main.__doc__).parse_args(argv)
    for op, table in IMPLEMENTATIONS.items():
        print(op)
        taken = False
        for name, implementation in table.items():
            reason = objection(implementation)
            calls = implementation.auto
            where = "where it supports the call"
            if calls is not None:
                where = " and ".join(f"for {', '.join(_facts(call))}" for call in calls) or "nowhere: name it"
            here = reason or ("auto comes to the ones above first" if taken else f"auto takes it {where}")
            taken |= not reason and not implementation.limits and implementation.dtypes is None and calls is None
            print(f"  {name:<8} {_supports(implementation)}\n           {here}")


if __name__ == "__main__":
    run_command(main)

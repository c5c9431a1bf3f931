"""Every op and implementation on one GPU, beside what the memory and the tensor cores gave in the same run.

    python bench/ops.py [--only GROUP ...] [--preset NAME ...] [--impl NAME ...] [--plot FILE]

Random arrays at the shapes of released models, as many copies in turn as are larger than the cache (L2).  A share is of
the streaming read for what is bound by bytes, of the copy for what reads and writes, and of the measured matrix product
for the rest.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import ops
from jaxllm.config import preset
from jaxllm.kernels.reference import GROUP

TRAFFIC = 1 << 30  # bytes that one program reads, from arrays of its own for each call: much more than an L2 holds
ROWS = (4, 16, 64, 128, 512, 2048)
ROUNDS = 32  # enough that the wait for their end does not count
REPEATS = 5


@dataclass(frozen=True)
class Case:
    """A call: function(impl, *arrays) of what make(key) gives; the bytes that it moves; twice its multiply-adds."""

    group: str
    name: str
    op: str
    make: Callable
    function: Callable  # of the name of an implementation, and the arrays
    read: int
    written: int = 0
    flops: int = 0
    ceiling: str = "read"
    carried: int = 0  # of the arrays, so many at the end are updated in place and returned at the end


def nbytes(*shapes):
    """The bytes of arrays given as (shape, dtype)."""
    return sum(int(np.prod(shape)) * jnp.dtype(dtype).itemsize for shape, dtype in shapes)


def random_array(key, shape, dtype):
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.randint(key, shape, -127, 128, jnp.int8).astype(dtype)
    return (jax.random.normal(key, shape, jnp.bfloat16) * 0.05).astype(dtype)


def maker(*shapes):
    """A function: random arrays of these (shape, dtype), from a key."""
    return lambda key: [
        random_array(jax.random.fold_in(key, number), shape, dtype) for number, (shape, dtype) in enumerate(shapes)
    ]


def matmul_cases(names):
    """One row of all matrices of a model; several rows of the largest two, of the first model that is named."""
    for name in names:
        config = preset(name)
        qkv = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        matrices = {
            "wqkv": (qkv, config.dim), "wo": (config.dim, config.n_heads * config.head_dim),
            "w_gate_up": (2 * config.ffn_dim, config.dim), "w_down": (config.dim, config.ffn_dim),
        }  # fmt: skip
        for matrix, (out, width) in matrices.items():
            for kind in "float32", "bfloat16", "int8", "int8-g128":
                yield matmul_case(f"{name} {matrix} {kind}", 1, out, width, kind)
            for rows in ROWS if name == names[0] and "w_" in matrix else ():
                for kind in "bfloat16", "int8", "w8a8":
                    yield matmul_case(f"{name} {matrix} {kind}", rows, out, width, kind)


def matmul_case(name, rows, out, width, kind):
    dtype = "float32" if kind == "float32" else "bfloat16"
    x, w = ((1, rows, width), dtype), ((out, width), "int8" if "8" in kind else dtype)
    groups = (-(-width // GROUP),) if kind == "int8-g128" else ()
    scale = ((out, *groups), "float32")
    if kind == "w8a8":
        op, shapes = "w8a8_matmul", [((1, rows, width), "int8"), ((1, rows), "float32"), w, scale]
    elif kind in ("float32", "bfloat16"):
        op, shapes = "matmul", [x, w]
    else:
        op, shapes = "int8_matmul", [x, w, scale]
    ceiling = "read" if rows <= 256 else "int8" if kind == "w8a8" else "bfloat16"
    call = implementation_call(op, dtype=jnp.dtype(dtype))
    return Case(
        f"matmul-{rows}", f"{name} {rows}", op, maker(*shapes), call, nbytes(*shapes), nbytes(((rows, out), dtype)),
        2 * rows * out * width, ceiling,
    )  # fmt: skip


def implementation_call(op, **options):
    def call(impl, *arrays):
        if impl == "cudnn":
            return cudnn_attention(*arrays)
        return ops._imported(ops.IMPLEMENTATIONS[op][impl].function)(*arrays, **options)

    return call


def cudnn_attention(q, k, v, positions):
    """The same through cuDNN, which wants [B, S, K, H]: k and v are given so, and a rows' filled slots as lengths."""
    batch, tokens, heads, group, dim = q.shape
    q = q.reshape(batch, tokens, heads * group, dim)
    k, v = (a.reshape(batch, a.shape[2], heads, dim) for a in (k, v))  # as many bytes; their order does not matter here
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=tokens > 1, implementation="cudnn",
        key_value_seq_lengths=None if tokens > 1 else positions[:, -1] + 1,
    )  # fmt: skip


def attention_cases():
    for heads, group in (32, 1), (8, 8):
        for batch in 1, 16:
            for slots in (1024, 8192, 65536) if batch == 1 else (1024, 8192):
                for kind in "bfloat16", "int8":
                    yield attention_case(
                        f"decode B{batch} S{slots} K{heads} G{group} {kind}", batch, 1, slots, heads, group, kind
                    )
    for tokens in 2048, 16384:
        for heads, group in (32, 1), (8, 8):
            yield attention_case(f"prefill T{tokens} K{heads} G{group}", 1, tokens, tokens, heads, group, "bfloat16")
    yield attention_case("prefill B8 T512 K32 G1", 8, 512, 512, 32, 1, "bfloat16")
    yield attention_case("prefill T2048 behind 8192 K32 G1", 1, 2048, 10240, 32, 1, "bfloat16")
    yield attention_case("prefill T2048 K32 G1 H64", 1, 2048, 2048, 32, 1, "bfloat16", dim=64)


def attention_case(name, batch, tokens, slots, heads, group, kind, dim=128):
    q, cache = ((batch, tokens, heads, group, dim), "bfloat16"), ((batch, heads, slots, dim), kind)
    scales = [((batch, heads, slots), "float32")] * 2 if kind == "int8" else []

    def make(key):
        q_, k, v, *more = maker(q, cache, cache, *scales)(key)
        positions = jnp.broadcast_to(jnp.arange(slots - tokens, slots), (batch, tokens))
        return [q_, k, v, positions, *(jnp.abs(scale) + 0.01 for scale in more)]

    visible = slots - (tokens - 1) / 2
    flops = int(4 * batch * tokens * heads * group * dim * visible)
    return Case(
        "attention-decode" if tokens == 1 else "attention-prefill", name, "attention", make,
        implementation_call("attention"), nbytes(q, cache, cache, *scales), nbytes(q), flops,
        "read" if tokens == 1 else "bfloat16",
    )  # fmt: skip


def row_cases():
    kind = "bfloat16"
    for rows, width in (8192, 4096), (16384, 8192):
        x, weight = ((rows, width), kind), ((width,), kind)
        yield Case(
            "rows", f"rms_norm {rows} x {width}", "rms_norm", maker(x, weight),
            implementation_call("rms_norm", eps=1e-5), nbytes(x), nbytes(x), ceiling="copy",
        )  # fmt: skip
        yield Case(
            "rows", f"add_rms_norm {rows} x {width}", "add_rms_norm", maker(x, x, weight),
            implementation_call("add_rms_norm", eps=1e-5), nbytes(x, x), nbytes(x, x), ceiling="copy",
        )  # fmt: skip
        both = ((rows, 2, width), kind)
        yield Case(
            "rows", f"swiglu {rows} x 2 x {width}", "swiglu", maker(both), implementation_call("swiglu"), nbytes(both),
            nbytes(x), ceiling="copy",
        )  # fmt: skip
    for rows, width in (8192, 4096), (1024, 32000), (512, 128256):
        x = ((rows, width), "float32")
        yield Case(
            "rows", f"softmax {rows} x {width}", "softmax", maker(x), implementation_call("softmax"), nbytes(x),
            nbytes(x), ceiling="copy",
        )  # fmt: skip
    x, angles = ((1, 8192, 32, 128), kind), ((1, 8192, 64), "float32")
    yield Case(
        "rows", "rope 8192 x 32 x 128", "rope", maker(x, angles, angles), implementation_call("rope"),
        nbytes(x, angles, angles), nbytes(x), ceiling="copy",
    )  # fmt: skip
    tokens = 8192
    qkv, cache = ((1, tokens, 32, 3, 128), kind), ((1, 32, tokens, 128), kind)
    angles, positions = ((1, tokens, 64), "float32"), jnp.arange(tokens)[None]

    def store(impl, qkv, cos, sin, k, v):
        return implementation_call("rope_store")(impl, qkv, cos, sin, positions, k, v)

    yield Case(
        "rows", "rope_store 8192 x 32 x 3 x 128", "rope_store", maker(qkv, angles, angles, cache, cache), store,
        nbytes(qkv, angles, angles), nbytes(qkv), ceiling="copy", carried=2,
    )  # fmt: skip


def seconds(function, sets, carried=0):
    """Seconds of one call of function on one of the sets of arrays, as in a decode loop: all calls in one CUDA graph.

    The last `carried` arrays are updated in place: they are given away, and the last results take their places.
    """
    state = [arrays[len(arrays) - carried :] for arrays in sets]
    fixed = [arrays[: len(arrays) - carried] for arrays in sets]
    program = jax.jit(partial(_rounds, function, carried), donate_argnums=1)
    _, state = jax.block_until_ready(program(fixed, state))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        results, state = jax.block_until_ready(program(fixed, state))
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / (ROUNDS * len(sets))


def _rounds(function, carried, fixed, state):
    """Call function on every set, ROUNDS times: the last results that are not carried, and the carried ones."""

    def call_all(number, state):
        # tied to the round, or XLA would compute before the loop what no round changes
        arrays, _ = jax.lax.optimization_barrier((fixed, number))
        results = [function(*given, *mine) for given, mine in zip(arrays, state, strict=True)]
        if not carried:
            return results, state
        return [result[:-carried] for result in results], [list(result[-carried:]) for result in results]

    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(call_all, 0, state)[0])
    return jax.lax.fori_loop(0, ROUNDS, lambda number, carry: call_all(number, carry[1]), (empty, state))


def ceilings():
    """What this device does at best: bytes/s read, bytes/s copied (both ways counted), and operations/s."""
    import triton
    import triton.language as tl

    from jaxllm.kernels.launch import launch

    @triton.jit
    def add_up(x, out, N: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
        start = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
        total = tl.zeros((BLOCK,), tl.int32)
        for step in range(STEPS):
            at = start + step * BLOCK + tl.arange(0, BLOCK)
            total += tl.load(x + at)
        tl.store(out + tl.program_id(0), tl.sum(total))

    # several arrays in one program: between two programs the GPU waits
    sets = [[jnp.full(1 << 28, number, jnp.int32)] for number in range(4)]
    nbytes = sets[0][0].nbytes

    def read(block, steps, warps, x):
        programs = x.size // (block * steps)
        out = jax.ShapeDtypeStruct((programs,), jnp.int32)
        return launch(add_up, x, out=out, grid=(programs,), num_warps=warps, N=x.size, BLOCK=block, STEPS=steps)

    shapes = [(1024, 16, 4), (2048, 8, 4), (2048, 16, 8), (4096, 4, 8), (4096, 16, 8), (8192, 8, 16)]
    best = min(seconds(partial(read, *shape), sets) for shape in shapes)
    found = {"read": nbytes / best, "copy": 2 * nbytes / seconds(lambda x: -x, sets)}
    for kind, result in ("bfloat16", "float32"), ("int8", "int32"):
        pair = maker(((8192, 8192), kind), ((8192, 8192), kind))(jax.random.key(0))
        product = seconds(partial(jnp.einsum, "ik,jk->ij", preferred_element_type=result), [pair])
        found[kind] = 2 * 8192**3 / product
    return found


def measure(case, impls, ceiling):
    """One line and one record for each implementation of a case."""
    count = max(1, min(64, TRAFFIC // case.read))
    sets = [case.make(jax.random.key(number)) for number in range(count)]
    jax.block_until_ready(sets)
    bound = max(
        case.read / ceiling["read"], (case.read + case.written) / ceiling["copy"] if case.ceiling == "copy" else 0,
        case.flops / ceiling["int8" if case.ceiling == "int8" else "bfloat16"],
    )  # fmt: skip
    for impl in impls:
        record = {"group": case.group, "case": case.name, "impl": impl, "bound_us": bound * 1e6}
        try:
            took = seconds(partial(case.function, impl), [list(arrays) for arrays in sets], case.carried)
            if case.carried:  # the buffers were given away
                sets = [case.make(jax.random.key(number)) for number in range(count)]
            record |= {"us": took * 1e6, "share": bound / took, "gb_per_s": (case.read + case.written) / took / 1e9}
            record["tflop_per_s"] = case.flops / took / 1e12
            print(
                f"{case.group:18} {case.name:44} {impl:7} {took * 1e6:10.1f} us (at best {bound * 1e6:8.1f}), share "
                f"{record['share']:.2f}",
                flush=True,
            )
        except Exception as error:  # of one implementation; the others are measured all the same
            record["error"] = f"{type(error).__name__}: {error}"[:300]
            print(f"{case.group:18} {case.name:44} {impl:7} failed: {record['error'][:100]}", flush=True)
        yield record


def plot(records, file):
    """Shares of all cases as an SVG: a row a case, a mark an implementation."""
    import matplotlib

    matplotlib.use("svg")
    # the same bytes for the same figures, and text as text
    matplotlib.rcParams |= {"svg.hashsalt": "ops", "svg.fonttype": "none", "font.size": 7}
    from matplotlib import pyplot

    measured = [record for record in records if "share" in record]
    names = list(dict.fromkeys((record["group"], record["case"]) for record in measured))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.16 * len(names)))
    for impl, marker in ("xla", "o"), ("cudnn", "s"), ("triton", "D"), ("mosaic", "^"):
        rows = [record for record in measured if record["impl"] == impl]
        places = [names.index((record["group"], record["case"])) for record in rows]
        axes.plot([record["share"] for record in rows], places, marker, markersize=4, label=impl)
    axes.set(xlim=(0, 1.05), ylim=(len(names), -1), xlabel="share of the ceiling that binds")
    axes.set_yticks(range(len(names)), [case for _, case in names])
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = ("matmul", "attention", "rows")
    parser.add_argument(
        "--only", nargs="+", default=groups, metavar="GROUP", help=f"beginnings of {', '.join(groups)}-N"
    )
    parser.add_argument("--preset", nargs="+", default=["llama2-7b", "tinyllama-1.1b", "llama2-70b"])
    parser.add_argument("--impl", nargs="+", default=["xla", "triton", "mosaic", "cudnn"])
    parser.add_argument("--plot", metavar="FILE", help="an SVG of the shares (takes matplotlib)")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("this bench needs a GPU")
    ceiling = ceilings()
    print("ceilings: " + ", ".join(f"{name} {value / 1e9:.0f} G/s" for name, value in ceiling.items()), flush=True)
    records = []
    for case in (*row_cases(), *attention_cases(), *matmul_cases(args.preset)):
        if case.group.startswith(tuple(args.only)):
            here = [*ops.IMPLEMENTATIONS[case.op]] + ["cudnn"] * (case.op == "attention")
            # cuDNN has no int8 cache, and its mask begins with the first slot; "mosaic" is for prefill
            not_here = {"cudnn"} if "int8" in case.name or "behind" in case.name else set()
            not_here |= {"mosaic"} if case.group == "attention-decode" else set()
            records += measure(case, [name for name in here if name in {*args.impl} - not_here], ceiling)
    if args.plot:
        plot(records, args.plot)
    device = {"device": jax.devices()[0].device_kind, "python": platform.python_version(), "jax": version("jax")}
    print(json.dumps({"bench": "ops", "ceilings": ceiling, "results": records} | device))


if __name__ == "__main__":
    main()

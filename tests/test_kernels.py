"""All Triton kernels together: they compile for the GPUs that they are meant for, and a model runs on them."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import ops
from jaxllm.config import ModelConfig, preset
from jaxllm.model import init_params, quantize_params
from jaxllm.ops import IMPLEMENTATIONS
from jaxllm.pipeline import generate_tokens
from jaxllm.sampling import Sampling

pytest.importorskip("triton", reason="kernels are written in Triton")

# each compute capability with one model's shapes: cards from A100 on
MODELS = {80: "tinyllama-1.1b", 86: "llama2-7b", 89: "llama2-70b", 90: "llama2-7b"}


def calls(name):
    """(name, op, arguments, options) of the calls that a released model makes, as shapes."""
    array = jax.ShapeDtypeStruct
    c = preset(name)
    for rows, dtype in [
        (1, "bfloat16"),
        (1, "float32"),
        (4, "bfloat16"),
        (33, "bfloat16"),
        (128, "bfloat16"),
        (2048, "bfloat16"),
    ]:
        x = array((1, rows, c.dim), dtype)
        norm, h = array((c.dim,), dtype), array((1, rows, c.ffn_dim), dtype)
        yield f"{name} rms_norm {rows}", "rms_norm", (x, norm), dict(eps=1e-5)
        yield f"{name} add_rms_norm {rows}", "add_rms_norm", (x, x, norm), dict(eps=1e-5)
        yield f"{name} swiglu {rows}", "swiglu", (array((1, rows, 2, c.ffn_dim), dtype),), {}
        gate_up, down = (2, c.ffn_dim, c.dim), (c.dim, c.ffn_dim)
        yield (
            f"{name} gate_up {rows} {dtype}", "matmul", (x, array(gate_up, dtype)),
            dict(gated=True, dtype=jnp.dtype(dtype), norm=norm, eps=1e-5),
        )  # fmt: skip
        more = dict(residual=x, dtype=jnp.dtype(dtype))
        yield f"{name} down {rows} {dtype}", "matmul", (h, array(down, dtype)), more
        for groups in (), (-(-c.ffn_dim // 128),):
            scale = array((c.dim, *groups), "float32")
            yield f"{name} int8 down {rows} {dtype} {groups}", "int8_matmul", (h, array(down, "int8"), scale), more
        yield (
            f"{name} w8a8 {rows}", "w8a8_matmul",
            (array(h.shape, "int8"), array((1, rows), "float32"), array(down, "int8"), array((c.dim,), "float32")),
            more,
        )  # fmt: skip
        k, g, slots = c.n_kv_heads, c.group, 4096
        angles, positions = array((1, rows, c.head_dim // 2), "float32"), array((1, rows), "int32")
        qkv = array((1, rows, k, g + 2, c.head_dim), dtype)
        for kind in dtype, "int8":
            cache = array((1, k, slots, c.head_dim), kind)
            scales = (array((1, k, slots), "float32"),) * 2 if kind == "int8" else ()
            yield (
                f"{name} rope_store {rows} {kind}", "rope_store",
                (qkv, angles, angles, positions, cache, cache, *scales), {},
            )  # fmt: skip
            q = array((1, rows, k, g, c.head_dim), dtype)
            yield f"{name} attention {rows} {kind}", "attention", (q, cache, cache, positions, *scales), {}
    for size in 32000, 128256:
        yield f"softmax {size}", "softmax", (array((1, size), "float32"),), {}
        yield (
            f"restrict {size}", "restrict",
            (array((1, size), "float32"), array((1,), "int32"), array((1,), "float32")), {},
        )  # fmt: skip


def compile_all(capability):
    """Print as JSON, for each call, the kernels that it launches: name, registers, spills, shared memory."""
    import compiler

    # block sizes depend on it
    jax.extend.backend.get_default_device = lambda: SimpleNamespace(compute_capability=".".join(str(capability)))
    found = {}
    for name, op, arguments, options in calls(MODELS[capability]):
        function = ops._imported(IMPLEMENTATIONS[op]["triton"].function)
        arrays = {key: value for key, value in options.items() if isinstance(value, jax.ShapeDtypeStruct)}
        rest = {key: value for key, value in options.items() if key not in arrays}

        def call(arguments, arrays, function=function, rest=rest):
            return function(*arguments, **arrays, **rest)

        kernels = compiler.compile_for(capability, call, arguments, arrays)
        found[name] = [(kernel.name, kernel.registers, kernel.spills, kernel.shared) for kernel in kernels]
    print(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("capability", MODELS)
def test_kernels_compile(capability, compiled_apart):
    """At the shapes of released models, without a GPU."""
    found = compiled_apart(f"compile_all({capability})")
    assert found.keys() == {name for name, *_ in calls(MODELS[capability])} and all(found.values())
    shared = {80: 163, 86: 99, 89: 99, 90: 227}[capability] << 10  # bytes of shared memory that a program may have
    for name, kernels in found.items():
        for kernel, _, spills, memory in kernels:
            assert spills == 0, (name, kernel)
            assert memory <= shared, (name, kernel)


@pytest.fixture
def anywhere(monkeypatch):
    """Lets the Triton kernels be asked for on this device: without a GPU, the interpreter runs them."""
    if jax.default_backend() != "gpu":
        for table in IMPLEMENTATIONS.values():
            if "triton" in table:
                here = replace(table["triton"], platform=None, capability=(0, 0), packages=())
                monkeypatch.setitem(table, "triton", here)


SMALL = ModelConfig(90, 96, 2, 4, 2, 64, 100, 64, dtype="float32")  # dots of bfloat16 are wrong in the interpreter


def tokens_of(config, params, prompts, count):
    chunks = generate_tokens(params, config, prompts, Sampling(temperature=0.0), count)
    return np.concatenate([np.asarray(chunk) for chunk in chunks], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("scheme, kv_cache", [(None, None), ("int8", "int8"), ("int8-g128", None), ("w8a8", None)])
def test_a_model_on_kernels_generates_the_same_tokens(anywhere, scheme, kv_cache):
    config = replace(SMALL, kv_cache=kv_cache)
    params = jax.tree.map(lambda leaf: leaf * (4 if leaf.ndim > 1 else 1), init_params(config, jax.random.key(1)))
    params = quantize_params(params, scheme) if scheme else params
    prompts = [[3, 14, 15, 9, 26], [5]]
    theirs = tokens_of(config, params, prompts, 4)
    assert len(np.unique(theirs)) > 4
    np.testing.assert_array_equal(tokens_of(replace(config, impl="triton"), params, prompts, 4), theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [*IMPLEMENTATIONS, None])
def test_256_tokens_are_the_same(op):
    config = replace(preset("tinyllama-1.1b"), n_layers=4, dtype="float32")
    params = jax.jit(partial(init_params, config))(jax.random.key(1))
    prompts = [np.random.default_rng(0).integers(3, config.vocab_size, 40).tolist()]
    for name in set(IMPLEMENTATIONS[op]) - {"mosaic"} if op else ["triton"]:  # which has no float32
        impl = f"{op}={name}" if op else name
        ours, theirs = (tokens_of(replace(config, impl=each), params, prompts, 256) for each in (impl, "xla"))
        np.testing.assert_array_equal(ours, theirs)

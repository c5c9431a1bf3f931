"""The registry: what is chosen, what is refused and why, and how implementations from outside come in."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import ops
from jaxllm.config import ModelConfig
from jaxllm.errors import InputError, ModelError
from jaxllm.kernels import reference
from jaxllm.model import forward, init_cache, init_params, quantize_params
from jaxllm.ops import IMPLEMENTATIONS, Implementation, check_implementations, choose, objection
from jaxllm.sampling import Sampling, sample

CONFIG = ModelConfig(60, 24, 2, 4, 2, 6, 20, 32)
GPU = SimpleNamespace(platform="gpu", compute_capability="8.6")


def opaque(function):
    """A function that jax can neither differentiate nor batch, as a kernel is."""

    def call(*arrays, norm=None, residual=None, **options):
        def run(arrays, norm, residual):
            named = {name: value for name, value in (("norm", norm), ("residual", residual)) if value is not None}
            return function(*arrays, **named, **options)

        shapes = jax.eval_shape(run, arrays, norm, residual)
        return jax.pure_callback(run, shapes, arrays, norm, residual)

    return call


@pytest.fixture
def own(monkeypatch):
    """A function that registers an implementation until the test ends."""

    def register(op, name, implementation):
        monkeypatch.setitem(IMPLEMENTATIONS[op], name, implementation)

    return register


def test_an_implementation_from_outside(own):
    calls = []

    def doubled(x, weight, eps):
        calls.append(x.shape)
        return 2 * reference.rms_norm(x, weight, eps)

    own("rms_norm", "mine", Implementation(doubled))
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jnp.array([[1, 2, 3]])
    plain, _ = forward(params, CONFIG, tokens)
    ours, _ = forward(params, replace(CONFIG, impl="rms_norm=mine"), tokens)
    assert calls == [(1, 3, 24)]
    np.testing.assert_allclose(ours, 2 * plain, rtol=1e-5)


def test_every_op_of_the_model_can_be_replaced(own):
    """All that a model does goes through the registry, whatever its weights, and the choice of the token too."""
    seen = set()

    def watched(op):
        def call(*arrays, **named):
            seen.add(op)
            return IMPLEMENTATIONS[op]["xla"].function(*arrays, **named)

        return call

    for op in IMPLEMENTATIONS.keys() - {"decode_step"}:  # which is all of them
        own(op, "watched", Implementation(watched(op)))
    for scheme, kv_cache in [(None, None), ("int8", "int8"), ("w8a8", None)]:
        config = replace(CONFIG, kv_cache=kv_cache, impl="watched")
        params = init_params(config, jax.random.key(0))
        params = quantize_params(params, scheme) if scheme else params
        tokens = jnp.array([[1, 2, 3]])
        ours, cache = forward(params, config, tokens, init_cache(config, 1, 8))
        theirs, other = forward(params, replace(config, impl="auto"), tokens, init_cache(config, 1, 8))
        np.testing.assert_array_equal(ours, theirs)
        jax.tree.map(np.testing.assert_array_equal, cache, other)
    forward(params, config, tokens)
    sample(ours[:, -1], Sampling(top_k=3).rows(1), jnp.array([0]), jnp.zeros((1, 60), bool), "watched")
    assert seen == IMPLEMENTATIONS.keys() - {"add_rms_norm", "softmax", "swiglu", "decode_step"}


def whole(x, cos, sin, positions, layers, norm, output, output_scale=None, eps=0.0):
    """A decode_step of its own, from the specifications of the other ops: what a kernel gets and returns."""

    def product(x, w, scale, **more):
        more = dict(dtype=x.dtype) | more
        return reference.matmul(x, w, **more) if scale is None else reference.int8_matmul(x, w, scale, **more)

    keys, values = [], []
    for attn_norm, wqkv, wo, ffn_norm, w_gate_up, w_down, scales, k, v in layers:
        scales = scales or (None,) * 4
        qkv = product(x, wqkv, scales[0], norm=attn_norm, eps=eps)
        q, k, v = reference.rope_store(qkv, cos, sin, positions, k, v)
        attended = reference.attention(q, k, v, positions)
        x = product(attended.reshape(*x.shape[:2], -1), wo, scales[1], residual=x)
        hidden = product(x, w_gate_up, scales[2], norm=ffn_norm, eps=eps, gated=True)
        x = product(hidden, w_down, scales[3], residual=x)
        keys.append(k)
        values.append(v)
    x = reference.rms_norm(x[:, 0], norm, eps)
    return product(x, output, output_scale, dtype=jnp.float32), tuple(keys), tuple(values)


@pytest.fixture
def steps(own):
    """The facts of the calls that an implementation of decode_step got that auto takes first, on any device."""
    calls = []

    def watched(*arrays, eps):
        calls.append(arrays)
        return whole(*arrays, eps=eps)

    facts = "weights", "cache", "window", "attention_bias", "qk_norm"  # the others ask for a GPU and for sizes
    limits = {fact: IMPLEMENTATIONS["decode_step"]["gluon"].limits[fact] for fact in facts}
    own("decode_step", "gluon", Implementation(watched, limits=limits, differentiable=False))
    return calls


STEP = jnp.array([[7]])


def steps_of(config, scheme=None, tokens=STEP, filled=3, params=None):
    """Logits and cache behind a prompt and one more step of it."""
    if params is None:
        params = init_params(config, jax.random.key(0))
        params = quantize_params(params, scheme) if scheme else params
    cache = init_cache(config, len(tokens), 8)
    if filled:
        _, cache = forward(params, config, jnp.tile(jnp.arange(filled), (len(tokens), 1)), cache)
    return forward(params, config, tokens, cache)


@pytest.mark.parametrize(
    "scheme, tied, batch", [(None, False, 1), (None, True, 3), ("int8", True, 1), ("int8", False, 3)]
)
def test_a_step_is_one_op(steps, scheme, tied, batch):
    config, tokens = replace(CONFIG, tied=tied, dtype="float32"), STEP + jnp.arange(batch)[:, None]
    ours, cache = steps_of(config, scheme, tokens)
    assert len(steps) == 1
    theirs, other = steps_of(replace(config, impl="decode_step=xla"), scheme, tokens)
    assert len(steps) == 1
    assert ours.shape == theirs.shape == (batch, 1, 60) and (cache.length == 4).all()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), cache, other)


@pytest.mark.parametrize(
    "more, scheme",
    [
        ({}, "int8-g128"),
        ({}, "w8a8"),
        ({"kv_cache": "int8"}, None),
        ({"sliding_window": 4}, None),
        ({"attention_bias": True}, None),
        ({"qk_norm": True}, None),
        ({"impl": "xla"}, None),
        ({"impl": "attention=xla"}, None),  # who names an op gets it
        ({"impl": "rms_norm=xla,decode_step=auto"}, None),
    ],
)
def test_what_is_no_whole_step(steps, more, scheme):
    config = replace(CONFIG, **more)
    jax.eval_shape(partial(steps_of, config, scheme))
    assert not steps
    if "impl" not in more:
        with pytest.raises(InputError, match="decode_step: gluon cannot do this: it takes"):
            jax.eval_shape(partial(steps_of, replace(config, impl="decode_step=gluon"), scheme))


def test_other_steps_than_of_one_token(steps):
    jax.eval_shape(lambda: forward(init_params(CONFIG, jax.random.key(0)), CONFIG, STEP))  # without a cache
    jax.eval_shape(partial(steps_of, CONFIG, tokens=jnp.array([[7, 8]])))
    assert not steps
    jax.eval_shape(partial(steps_of, replace(CONFIG, impl="restrict=xla")))  # which is not a part of it
    assert len(steps) == 1


def test_norms_come_in_the_type_of_activations(steps):
    config, params = replace(CONFIG, dtype="float32"), init_params(CONFIG, jax.random.key(0))  # of bfloat16
    jax.eval_shape(partial(steps_of, config, params=params))
    assert not steps  # weights are of another type, too
    jax.eval_shape(partial(steps_of, config, params=quantize_params(params, "int8")))
    ((x, _, _, _, layers, norm, output, scale),) = steps
    assert {x.dtype, norm.dtype, layers[0][0].dtype, layers[1][3].dtype} == {jnp.dtype("float32")}
    assert output.dtype == layers[0][1].dtype == jnp.int8 and scale.shape == (60,)


def test_a_whole_step_is_differentiated_and_batched_as_its_parts(own):
    own("decode_step", "gluon", Implementation(opaque(whole), differentiable=False))
    config = replace(CONFIG, n_layers=1)
    params, cache = init_params(config, jax.random.key(0)), init_cache(config, 1, 8)

    def loss(params, token, impl="auto"):
        return jnp.sum(jnp.sin(forward(params, replace(config, impl=impl), token[None, None], cache)[0]))

    ours, theirs = (jax.grad(partial(loss, impl=impl))(params, jnp.array(7)) for impl in ("auto", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)
    assert jnp.abs(ours.layers[0].w_down).max() > 0
    ours, theirs = (jax.vmap(partial(loss, impl=impl), (None, 0))(params, jnp.arange(3)) for impl in ("auto", "xla"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_kernel_is_differentiated_and_batched_as_the_specification(own):
    weight = jnp.linspace(0.5, 2, 24)
    x = jax.random.normal(jax.random.key(0), (3, 24))
    own("rms_norm", "kernel", Implementation(opaque(reference.rms_norm), differentiable=False))
    own("matmul", "kernel", Implementation(opaque(reference.matmul), differentiable=False))

    def f(impl):
        return lambda x, w: jnp.sum(jnp.sin(ops.matmul(ops.rms_norm(x, w, 1e-5, impl), jnp.eye(24), w, x, impl=impl)))

    for ours, theirs in zip(
        jax.grad(f("kernel"), (0, 1))(x, weight), jax.grad(f("xla"), (0, 1))(x, weight), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert jnp.abs(ours).max() > 0.1
    batch = jnp.stack([x, 2 * x + 1])
    for axes in [(0, None), (1, None), (0, 0)]:
        weights = jnp.stack([weight, weight**2]) if axes[1] == 0 else weight
        mapped = batch.swapaxes(0, axes[0])
        ours, theirs = (jax.vmap(f(impl), in_axes=axes)(mapped, weights) for impl in ("kernel", "xla"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    "impl, expected",
    [
        ("auto", "fast"),
        ("xla", "xla"),
        ("swiglu=xla", "fast"),
        ("rms_norm=xla", "xla"),
        ("xla,rms_norm=fast", "fast"),
        ("rms_norm=fast,xla", "fast"),
        ("xla,rms_norm=auto", "fast"),
        ("mine", "fast"),  # this op has none of that name
    ],
)
def test_who_is_chosen(monkeypatch, impl, expected):
    table = {name: Implementation(reference.rms_norm) for name in ("fast", "xla")}
    monkeypatch.setitem(IMPLEMENTATIONS, "rms_norm", table)
    monkeypatch.setitem(IMPLEMENTATIONS["swiglu"], "mine", Implementation(reference.swiglu))
    assert choose("rms_norm", impl, jnp.float32, {}) is table[expected]


@pytest.mark.parametrize(
    "more, call, reason",
    [
        ({}, {}, None),
        ({"platform": "gpu"}, {}, None),
        ({"platform": "tpu"}, {}, "needs a tpu, and JAX's default device is a gpu"),
        ({"capability": (8, 6)}, {}, None),
        ({"capability": (8, 9)}, {}, "needs compute capability 8.9, and this GPU has 8.6"),
        ({"packages": ("numpy",)}, {}, None),
        ({"packages": ("numpy", "no_such_package")}, {}, "needs the package no_such_package"),
        ({"dtypes": ("float32", "int8")}, {"dtype": "int8"}, None),
        ({"dtypes": ("float32",)}, {"dtype": "bfloat16"}, "takes float32, not bfloat16"),
        ({"limits": {"rows": range(1, 17)}}, {"facts": {"rows": 16}}, None),
        ({"limits": {"rows": range(1, 17)}}, {"facts": {"rows": 17}}, "takes rows 1 to 16, not 17"),
        ({"limits": {"head_dim": (64, 128)}}, {"facts": {"head_dim": 96}}, "takes head_dim 64, 128, not 96"),
        ({"limits": {"rows": range(1, 17)}, "dtypes": ("int8",)}, {}, None),  # not asked about a call
    ],
)
def test_what_is_not_supported(monkeypatch, more, call, reason):
    monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: GPU)
    implementation = Implementation(reference.rms_norm, **more)
    found = objection(implementation, **call)
    assert found is None if reason is None else reason in found
    table = {"fast": implementation, "xla": Implementation(reference.rms_norm)}
    monkeypatch.setitem(IMPLEMENTATIONS, "rms_norm", table)
    arguments = call.get("dtype", "int8" if "dtypes" in more else "float32"), call.get("facts", {"rows": 1})
    assert choose("rms_norm", "auto", *arguments) is table["fast" if reason is None else "xla"]
    if reason is None:
        assert choose("rms_norm", "fast", *arguments) is table["fast"]
    else:
        with pytest.raises(InputError, match=f"rms_norm: fast cannot do this: it {reason}.*; choose another, or auto"):
            choose("rms_norm", "fast", *arguments)


def test_other_gpus_are_told(monkeypatch):
    other = SimpleNamespace(platform="gpu", compute_capability="gfx942", device_kind="AMD Instinct MI300X")
    monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: other)
    monkeypatch.setattr(ops, "find_spec", lambda name: object())
    assert "needs an NVIDIA GPU" in objection(IMPLEMENTATIONS["rms_norm"]["triton"])


def test_auto_takes_an_implementation_where_it_is_fastest(monkeypatch):
    fast = Implementation(reference.matmul, auto=({"rows": (1,)}, {"dtype": ("int8",), "rows": range(1, 9)}))
    table = {"fast": fast, "xla": Implementation(reference.matmul)}
    monkeypatch.setitem(IMPLEMENTATIONS, "matmul", table)
    for dtype, rows, name in [("int8", 8, "fast"), ("int8", 9, "xla"), ("float32", 1, "fast"), ("float32", 2, "xla")]:
        assert choose("matmul", "auto", dtype, {"rows": rows}) is table[name]
        assert choose("matmul", "fast", dtype, {"rows": rows}) is fast  # by name everywhere


def test_old_pythons_are_told(monkeypatch):
    monkeypatch.setattr(ops.sys, "version_info", (3, 11, 4))
    implementation = Implementation(reference.rms_norm, packages=("no_such_package",))
    assert "it needs Python 3.12" in objection(implementation)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there they run")
def test_kernels_without_a_gpu_are_refused_by_name():
    check_implementations("auto,xla")
    for impl in ("triton", "attention=triton,xla"):
        with pytest.raises(
            InputError, match="'triton' cannot be used here: it needs a gpu, and JAX's default device is a"
        ):
            check_implementations(impl)
        with pytest.raises(InputError, match="attention: triton cannot do this: it needs a gpu"):
            choose("attention", impl, jnp.float32, {"head_dim": 64})


@pytest.mark.parametrize(
    "impl, message",
    [
        ("cuda", "implementation 'cuda' is not in this jaxllm; there are auto, gluon, mosaic, triton, xla"),
        ("atention=xla", "no op called 'atention'; there are rms_norm, "),
        ("rms_norm=cudnn", "implementation 'cudnn' is not in this jaxllm"),
        ("", "implementation ''"),
    ],
)
def test_names_that_do_not_exist(impl, message):
    with pytest.raises(InputError, match=message):
        check_implementations(impl)
    with pytest.raises(InputError, match=message):
        forward(init_params(CONFIG, jax.random.key(0)), replace(CONFIG, impl=impl), jnp.array([[1]]))


def test_the_setting_is_not_stored():
    config = replace(CONFIG, impl="xla")
    assert "impl" not in config.to_json() and ModelConfig.from_json(config.to_json()) == CONFIG
    with pytest.raises(ModelError, match="impl=3"):
        replace(CONFIG, impl=3)


def test_the_table_is_printed(capsys):
    ops.main([])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [*IMPLEMENTATIONS]
    assert out.count("auto takes it") == len(IMPLEMENTATIONS)
    if jax.default_backend() == "cpu":
        assert "gpu from compute capability 8.0; float32 bfloat16 float16; head_dim 64, 80, 96, 128" in out
        assert "it needs a gpu, and JAX's default device is a cpu" in out

"""The kernels that go through rows one by one (norms, softmax, SwiGLU) against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")

from jaxllm.kernels import reference, rms_norm, softmax, swiglu  # noqa: E402

RNG = np.random.default_rng(0)
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
SHAPES = [(1,), (3, 5, 7), (6, 64), (8, 257), (3, 1040)]
LONG = [(1, 5120), (2, 16384), (1, 16383)]


@pytest.fixture(params=BOUNDS)
def dtype(request):
    return request.param


def random(*shape, dtype, scale=1.0):
    return jnp.asarray(RNG.normal(size=shape) * scale, dtype)


def to64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def check(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    error = np.linalg.norm(np.asarray(got, np.float64) - want)
    assert np.isfinite(want).all() and error <= BOUNDS[dtype] * max(np.linalg.norm(want), 1e-30)


def rms_norm64(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("shape", SHAPES + LONG, ids=str)
def test_rms_norm(shape, dtype):
    x, weight = random(*shape, dtype=dtype, scale=20), random(shape[-1], dtype=dtype)
    got = jax.jit(rms_norm.rms_norm, static_argnums=2)(x, weight, 1e-3)
    check(got, rms_norm64(*to64(x, weight), 1e-3), dtype)
    check(got, *to64(reference.rms_norm(x, weight, 1e-3)), dtype)


@pytest.mark.parametrize("shape", SHAPES + LONG, ids=str)
def test_add_rms_norm(shape, dtype):
    x, delta, weight = (random(*s, dtype=dtype, scale=20) for s in (shape, shape, shape[-1:]))
    total, got = jax.jit(rms_norm.add_rms_norm, static_argnums=3)(x, delta, weight, 1e-3)
    if dtype != "bfloat16":  # Triton's interpreter truncates to it
        np.testing.assert_array_equal(total, x + delta)
    check(got, rms_norm64(*to64(total, weight), 1e-3), dtype)
    for ours, want in zip((total, got), reference.add_rms_norm(x, delta, weight, 1e-3), strict=True):
        check(ours, *to64(want), dtype)


def test_add_rms_norm_is_of_the_rounded_sum():
    x, delta = jnp.full((1, 64), 2048, jnp.float16), jnp.zeros((1, 64), jnp.float16).at[0, 5].set(0.99)
    total, got = rms_norm.add_rms_norm(x, delta, jnp.full(64, 1.5, jnp.float16), 0.0)
    np.testing.assert_array_equal(total, x)
    np.testing.assert_array_equal(got, np.full((1, 64), 1.5))  # of 2048.99, one would be 1.501


@pytest.mark.parametrize("value", [0.0, 1e-4, -7.0, 1e4])
def test_rms_norm_of_equal_values(value, dtype):
    x, weight = jnp.full((3, 70), value, dtype), random(70, dtype=dtype)
    check(rms_norm.rms_norm(x, weight, 1e-6), rms_norm64(*to64(x, weight), 1e-6), dtype)


def test_rms_norm_of_huge_and_small_values():
    x = jnp.asarray([[1e18] * 50, [1e-18] * 50, [1e18] + [1e-18] * 49])
    check(rms_norm.rms_norm(x, jnp.ones(50), 1e-30), rms_norm64(*to64(x, jnp.ones(50)), 1e-30), "float32")


def softmax64(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(params=["held", "split"])
def way(request, monkeypatch):
    """Both ways to go through a row, at sizes that are quick to interpret."""
    if request.param == "split":
        monkeypatch.setattr(softmax, "HELD", 0)
        monkeypatch.setattr(softmax, "PIECE", 64)
        monkeypatch.setattr(softmax, "AHEAD", 768)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(shape, dtype, way):
    x = random(*shape, dtype=dtype, scale=4)
    got = softmax.softmax(x)
    check(got, softmax64(*to64(x)), dtype)
    check(got, *to64(reference.softmax(x)), dtype)


@pytest.mark.parametrize("size", [softmax.HELD, softmax.HELD + 1, 128256])
def test_softmax_of_long_rows(size):
    x = random(1, size, dtype="float32", scale=4)
    check(jax.jit(softmax.softmax)(x), softmax64(*to64(x)), "float32")


def test_softmax_of_extreme_rows(way):
    x = np.full((9, 200), -np.inf, np.float32)
    x[0] = 0
    x[1] = -3e38
    x[2, 130] = 5  # alone
    x[3, 100:] = np.arange(100) * 30  # of the first 100, none
    x[4, :100] = -np.arange(100) * 30
    x[5] = np.where(np.arange(200) % 2, 3e38, -3e38)
    x[6] = RNG.normal(size=200) - 1e4
    x[7] = np.arange(200) - 1e30
    x[8, ::3] = 88.0
    got = np.asarray(softmax.softmax(jnp.asarray(x)))
    check(got, softmax64(x.astype(np.float64)), "float32")
    assert (got[x == -np.inf] == 0).all()


def test_softmax_of_nothing_is_nan(way):
    x = random(3, 150, dtype="float32").at[1].set(-jnp.inf).at[2].add(-1e4)
    got = np.asarray(softmax.softmax(x))
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[[0, 2]].sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2, 5), (3, 2, 2, 300), (2, 256), (4, 2, 1025), (2, 11008)], ids=str)
def test_swiglu(shape, dtype):
    gate_up = random(*shape, dtype=dtype, scale=3)
    got = swiglu.swiglu(gate_up)
    (x,) = to64(gate_up)
    check(got, x[..., 0, :] / (1 + np.exp(-x[..., 0, :])) * x[..., 1, :], dtype)
    check(got, *to64(reference.swiglu(gate_up)), dtype)


def test_swiglu_of_large_blocks(monkeypatch):
    monkeypatch.setattr(swiglu, "_tile", lambda rows, width: (1024, 4))  # as of many rows
    test_swiglu((3, 2, 2500), "float32")


def test_swiglu_of_extreme_gates():
    gate = np.array([0.0, -0.0, 1e-30, 80.0, -80.0, 200.0, -200.0, 1e30, -1e30, 3e38, -3e38])
    got = swiglu.swiglu(jnp.asarray([gate, np.full(gate.size, 0.5)], jnp.float32))
    np.testing.assert_allclose(got, np.where(gate > 0, gate, 0) / 2 / (1 + (gate == 1e-30)), rtol=1e-5, atol=1e-30)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 4096])
@pytest.mark.parametrize("width", [2048, 4096, 8192, 5632, 11008, 28672, 32000])
def test_real_shapes(rows, width, dtype):
    if width <= 16384:
        test_rms_norm((rows, width), dtype)
        test_add_rms_norm((rows, width), dtype)
    test_softmax((rows, width), dtype, None)
    test_swiglu((rows, 2, width), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 128256), (9, 151936), (64, 50257), (300, 128256), (40, 262144)], ids=str)
def test_softmax_of_many_long_rows(shape, dtype):
    test_softmax(shape, dtype, None)

"""Every reference op against float64 numpy, at odd shapes and extreme values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels import reference

RNG = np.random.default_rng(0)


def relative(got, want):
    assert got.shape == want.shape and np.isfinite(want).all()
    return np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 5e-3)])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 257)])
def test_rms_norm(shape, dtype, bound):
    x, w = jnp.asarray(RNG.normal(size=shape) * 30, dtype), jnp.asarray(RNG.normal(size=shape[-1:]), dtype)
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    got = reference.rms_norm(x, w, 1e-3)
    assert got.dtype == dtype
    assert relative(got, x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-3) * w64) < bound
    assert (reference.rms_norm(jnp.zeros(4), jnp.ones(4), 1e-6) == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (3,), (2, 4), (9,), (2, 33)])
@pytest.mark.parametrize("out", [(1,), (13,), (2, 3, 5)])
def test_matmul(rows, out, dtype):
    x = jnp.asarray(RNG.normal(size=(*rows, 17)), jnp.float32)
    w = RNG.integers(-127, 128, (*out, 17)) if dtype == "int8" else RNG.normal(size=(*out, 17))
    w = jnp.asarray(w, dtype)
    want = np.tensordot(np.asarray(x, np.float64), np.asarray(w, np.float64), axes=(-1, -1))
    got = jax.jit(reference.matmul)(x, w)
    assert got.dtype == jnp.float32 and relative(got, want) < 1e-6
    if dtype == "int8":
        scale = jnp.asarray(RNG.uniform(size=out), jnp.float32)
        got = jax.jit(reference.int8_matmul)(x, w, scale.at[(0,) * len(out)].set(0))
        scale64 = np.asarray(scale, np.float64)
        scale64[(0,) * len(out)] = 0
        assert relative(got, want * scale64) < 1e-6


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_matmul_of_bfloat16_sums_in_float32(rows):
    x, w = (jnp.asarray(RNG.normal(size=shape), jnp.bfloat16) for shape in ((rows, 4000), (11, 4000)))
    got = jax.jit(reference.matmul)(x, w)
    assert got.dtype == jnp.float32
    assert relative(got, np.asarray(x, np.float64) @ np.asarray(w, np.float64).T) < 1e-5  # bfloat16 sums: 1e-2


ROWS = [(), (1, 1), (2,), (8,), (9,), (3, 11)]


@pytest.mark.parametrize("rows, dtype, bound", [(rows, "float32", 1e-6) for rows in ROWS] + [((9,), "bfloat16", 3e-3)])
def test_int8_matmul_of_groups(rows, dtype, bound):
    cases, wants = [], []
    for *out, size in ((2, 1, 3, 300), (7, 128)):
        x = jnp.asarray(RNG.normal(size=(*rows, size)), dtype)
        values = RNG.integers(-127, 128, (*out, size)).astype(np.int8)
        scale = RNG.uniform(size=(*out, -(-size // 128))).astype(np.float32)
        w = values * np.stack([scale[..., i // 128].astype(np.float64) for i in range(size)], axis=-1)
        cases.append((x, values, scale))
        wants.append(np.tensordot(np.asarray(x, np.float64), w, axes=(-1, -1)))
    compiled = jax.jit(lambda cases: [reference.int8_matmul(*case) for case in cases])
    for got, want in zip(compiled(cases), wants, strict=True):
        assert got.dtype == jnp.float32 and relative(got, want) < bound


@pytest.mark.parametrize("rows", ROWS)
def test_w8a8_matmul_sums_in_int32(rows):
    same, at = np.full((*rows, 11008), 127), np.arange(11008)
    # one sum is far above 2**24, from where on float32 skips integers; the others go that far or not, and come back
    extreme = np.stack([np.full(11008, 127), np.where(at < 5504, 127, -127), np.where(at % 2, -127, 127)])
    extreme[1:, 0] = 126
    random = [RNG.integers(-127, 128, shape) for shape in ((*rows, 300), (2, 3, 5, 300))]
    cases, wants = [], []
    for x, w in (random, (same, extreme), (-same, extreme)):
        x_scale, scale = (2.0 ** RNG.integers(-9, 9, shape) for shape in (rows, w.shape[:-1]))
        cases.append((x.astype(np.int8), x_scale.astype(np.float32), w.astype(np.int8), scale.astype(np.float32)))
        exact = np.tensordot(x, w, axes=(-1, -1))  # in int64
        wants.append(exact.astype(np.float32) * np.multiply.outer(x_scale, scale))  # powers of two do not round
    compiled = jax.jit(lambda cases: [reference.w8a8_matmul(*map(jnp.asarray, case)) for case in cases])
    for got, want in zip(compiled(cases), wants, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, want)


def test_rope_turns_pairs_half_a_head_apart():
    x = RNG.normal(size=(2, 3, 5, 8))
    angle = RNG.uniform(0, 1e4, (2, 3, 4))
    got = reference.rope(jnp.asarray(x, jnp.float32), np.cos(angle), np.sin(angle))
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, :, None]
    assert relative(got, np.concatenate([z.real, z.imag], -1)) < 1e-6


@pytest.mark.parametrize("heads, kind", [((1, 1), ""), ((1, 3), ""), ((4, 1), ""), ((2, 2), ""), ((2, 2), "int8")])
@pytest.mark.parametrize("count, slots", [(1, 1), (1, 9), (5, 9)])
def test_attention(heads, kind, count, slots):
    (K, G), H = heads, 6
    q = RNG.normal(size=(2, count, K, G, H)) * 3
    k, v = RNG.normal(size=(2, 2, K, slots, H))
    start = np.array([0, slots - count])
    positions = start[:, None] + np.arange(count)
    filled = np.arange(slots) < start[:, None] + count
    poison = np.where(filled[:, None, :, None], 0, 1e4)  # what lies in free slots must not count
    if kind == "int8":
        k8, v8 = (RNG.integers(-127, 128, a.shape) for a in (k, v))
        k_scale, v_scale = (RNG.uniform(0.002, 0.02, a.shape[:-1]).astype(np.float32) for a in (k, v))
        k, v = k8 * k_scale[..., None].astype(np.float64), v8 * v_scale[..., None].astype(np.float64)
        q, k8, v8 = (jnp.asarray(a, t) for a, t in ((q, jnp.float32), (k8, jnp.int8), (v8, jnp.int8)))
        got = reference.attention(q, k8, v8, positions, k_scale + poison[..., 0], v_scale + poison[..., 0])
        q = np.asarray(q, np.float64)
    else:
        arguments = [jnp.asarray(a, jnp.float32) for a in (q, k + poison, v + poison)]
        got = reference.attention(*arguments, positions)
    want = np.zeros(q.shape)
    for b, t, n, g in np.ndindex(2, count, K, G):
        seen = positions[b, t] + 1
        e = np.exp(k[b, n, :seen] @ q[b, t, n, g] / np.sqrt(H))
        want[b, t, n, g] = e @ v[b, n, :seen] / e.sum()
    assert relative(got, want) < 1e-6


def test_attention_of_equal_and_of_huge_scores():
    v = jnp.asarray(RNG.normal(size=(1, 1, 6, 4)), jnp.float32)
    flat = reference.attention(jnp.zeros((1, 1, 1, 1, 4)), jnp.ones((1, 1, 6, 4)), v, np.array([[4]]))
    np.testing.assert_allclose(flat[0, 0, 0, 0], v[0, 0, :5].mean(0), rtol=1e-5)
    k = jnp.zeros((1, 1, 6, 4)).at[0, 0, 2].set(1e4)
    sharp = reference.attention(jnp.full((1, 1, 1, 1, 4), 1e4), k, v, np.array([[5]]))
    np.testing.assert_array_equal(sharp[0, 0, 0, 0], v[0, 0, 2])


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_swiglu(dtype, bound):
    gate, up = (jnp.asarray(RNG.normal(size=(3, 11)) * 20, dtype) for _ in range(2))
    gate64, up64 = (np.asarray(a, np.float64) for a in (gate, up))
    got = reference.swiglu(jnp.stack([gate, up], -2))
    assert got.dtype == dtype and relative(got, gate64 / (1 + np.exp(-gate64)) * up64) < bound
    assert np.isfinite(reference.swiglu(jnp.array([[-1e30, 1e30], [1, 1]]))).all()

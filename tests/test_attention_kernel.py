"""The attention kernels against float64 numpy, with anything in the slots that are not filled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")

from jaxllm.kernels import reference  # noqa: E402
from jaxllm.kernels.attention import FEW_ROWS, attention  # noqa: E402

RNG = np.random.default_rng(0)
BOUND = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
# the interpreter cannot multiply matrices of bfloat16
TYPES = ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.gpu)]


def relative(got, want):
    assert got.shape == want.shape and np.isfinite(want).all()
    return np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30)


def softmax_sum(q, k, v, positions):
    """Attention in float64, one kv head at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    for b, n in np.ndindex(*k.shape[:2]):
        scores = np.tensordot(q[b, :, n], k[b, n], (-1, -1)) / np.sqrt(q.shape[-1])  # [T, G, S]
        scores[np.broadcast_to(np.arange(k.shape[2]) > positions[b][:, None, None], scores.shape)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ v[b, n]
    return out


def case(B, T, K, G, H, S, start, dtype, cache):
    """Arguments of attention, free slots full of NaN where the type has one, and the result in float64."""
    positions = np.reshape(start, (B, 1)) + np.arange(T)
    free = np.arange(S) > positions[:, -1:]
    q = jnp.asarray(RNG.normal(size=(B, T, K, G, H)), dtype)
    poison = np.where(free, np.nan, 0)[:, None]
    if cache == "int8":
        k, v = (RNG.integers(-127, 128, (B, K, S, H)) for _ in "kv")
        k_scale, v_scale = (RNG.uniform(0.005, 0.03, (B, K, S)).astype(np.float32) for _ in "kv")
        want = softmax_sum(q, k * k_scale[..., None], v * v_scale[..., None], positions)
        scales = [jnp.asarray(a + poison, jnp.float32) for a in (k_scale, v_scale)]
        cache = [jnp.asarray(a, jnp.int8) for a in (k, v)]
    else:
        k, v = (jnp.asarray(RNG.normal(size=(B, K, S, H)) * 2, dtype) for _ in "kv")
        want = softmax_sum(q, k, v, positions)
        scales = []
        cache = [jnp.asarray(np.asarray(a, np.float32) + poison[..., None], dtype) for a in (k, v)]
    return (q, *cache, jnp.asarray(positions, jnp.int32), *scales), want


SHAPES = [
    (1, 1, 1, 1, 64, 1, [0]),
    (2, 1, 2, 1, 128, 200, [0, 130]),  # one split of several has slots
    (3, 1, 1, 8, 64, 257, [256, 127, 128]),
    (1, 1, 2, 3, 80, 500, [498]),
    (2, 2, 1, 5, 96, 300, [4, 297]),  # split, with a row that sees nothing of the last split
    (1, 16, 1, 2, 64, 150, [126]),
    (2, 3, 2, 7, 80, 67, [60, 0]),
    (1, 130, 1, 1, 64, 133, [0]),
    (2, 44, 1, 3, 80, 200, [150, 3]),  # a chunk behind what is filled, rows of the batch at different places
    (1, 35, 2, 4, 128, 70, [34]),
]


@pytest.mark.parametrize("cache", ["", "int8"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("B, T, K, G, H, S, start", SHAPES)
def test_attention(B, T, K, G, H, S, start, dtype, cache):
    arguments, want = case(B, T, K, G, H, S, start, dtype, cache)
    got = jax.jit(attention)(*arguments)
    assert got.dtype == dtype and relative(got, want) < BOUND[dtype]


@pytest.mark.parametrize("cache", ["", "int8"])
def test_attention_is_the_reference(cache):
    arguments, _ = case(2, 5, 2, 3, 64, 90, [7, 80], "float32", cache)
    want = reference.attention(*map(jnp.nan_to_num, arguments[:3]), arguments[3], *map(jnp.nan_to_num, arguments[4:]))
    assert relative(attention(*arguments), np.asarray(want, np.float64)) < 1e-5


def test_one_split_and_many_agree(monkeypatch):
    module = attention.__globals__
    arguments, want = case(2, 2, 2, 2, 64, 400, [397, 100], "float32", "")
    blocks = module["blocks"]
    for programs in (1, 8, 24, 10**6):  # 1, 2, 6 splits, and as many as there are blocks
        monkeypatch.setitem(module, "blocks", lambda *call, programs=programs: blocks(*call) | {"PROGRAMS": programs})
        assert relative(attention(*arguments), want) < 1e-5


@pytest.mark.parametrize("cache", ["", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("H", [64, 80])
def test_one_query(H, dtype, cache, monkeypatch):
    module = attention.__globals__
    arguments, want = case(2, 1, 2, 1, H, 130, [0, 121], dtype, cache)
    for programs in (1, 12):  # 1 and 3 splits
        monkeypatch.setitem(module, "ONE_QUERY_PROGRAMS", programs)
        assert relative(attention(*arguments), want) < BOUND[dtype]


@pytest.mark.parametrize("T, S", [(1, 300), (FEW_ROWS + 7, 150)])
def test_positions_beyond_the_last_slot_see_all_slots(T, S):
    # padding reaches there; what it gets means nothing, but must not be read outside of the cache
    arguments, _ = case(1, T, 1, 1, 64, S, [S - T], "float32", "")
    q, k, v, positions = arguments
    before = attention(q, k, v, positions - 1000)  # padding, which sees one slot
    assert relative(before, np.asarray(attention(q, k, v, jnp.zeros_like(positions)), np.float64)) < 1e-6
    beyond = attention(q, k, v, positions + 1000)
    assert relative(beyond, np.asarray(attention(q, k, v, jnp.full_like(positions, S - 1)), np.float64)) < 1e-6


@pytest.mark.parametrize("T, S", [(1, 300), (FEW_ROWS + 7, 150)])
def test_equal_and_huge_scores(T, S):
    v = jnp.asarray(RNG.normal(size=(1, 1, S, 64)), jnp.float32)
    positions = jnp.arange(S - T, S, dtype=jnp.int32)[None]
    flat = attention(jnp.zeros((1, T, 1, 1, 64)), jnp.ones((1, 1, S, 64)), v, positions)
    means = np.cumsum(np.asarray(v[0, 0], np.float64), 0) / np.arange(1, S + 1)[:, None]
    assert relative(flat[0, :, 0, 0], means[S - T :]) < 1e-5
    for sign in (1.0, -1.0):
        # slot 2 has the one score that is not 0: so high that it takes all, or so low that it gets nothing
        k = jnp.zeros((1, 1, S, 64)).at[0, 0, 2].set(1e4 * sign)
        sharp = attention(jnp.full((1, T, 1, 1, 64), 1e4), k, v, positions)[0, :, 0, 0]
        rows = np.asarray(v[0, 0], np.float64)
        rest = (np.cumsum(rows, 0) - rows[2]) / np.arange(S)[:, None].clip(1)
        want = np.broadcast_to(rows[2], sharp.shape) if sign > 0 else rest[S - T :]
        seen = np.asarray(positions[0]) >= 2
        assert relative(sharp[seen], want[seen]) < 1e-5
    low = attention(jnp.full((1, T, 1, 1, 64), -1e3), jnp.full((1, 1, S, 64), 1e3), v, positions)  # all of them
    assert relative(low, np.asarray(flat, np.float64)) < 1e-5


def test_int8_scales_of_zero_and_of_huge_and_tiny_numbers():
    q, values = (jnp.asarray(RNG.normal(size=(1, 1, 1, 2, 64)), "float32"), RNG.integers(-127, 128, (2, 1, 1, 90, 64)))
    k, v = jnp.asarray(values, jnp.int8)
    positions = jnp.asarray([[80]], jnp.int32)
    plain = np.full((1, 1, 90), 0.01, np.float32)
    for factor in (1e-30, 1e30):
        want = softmax_sum(q, values[0] * plain[..., None], values[1] * (plain * factor)[..., None], positions)
        assert relative(attention(q, k, v, positions, plain, jnp.asarray(plain * factor, jnp.float32)), want) < 1e-5
    even = attention(q, k, v, positions, jnp.zeros((1, 1, 90)), plain)  # every score is 0
    assert relative(even[0, 0, 0, 1], values[1, 0, 0, :81].mean(0) * 0.01) < 1e-5
    assert (attention(q, k, v, positions, plain, jnp.zeros((1, 1, 90))) == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["", "int8"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("K, G, H", [(4, 8, 64), (32, 1, 128), (8, 8, 128), (2, 3, 80)])
@pytest.mark.parametrize("B, T, S, start", [(1, 1, 4099, [4001]), (3, 9, 1500, [1400, 0, 77]), (1, 515, 1100, [512])])
def test_real_shapes(K, G, H, B, T, S, start, dtype, cache):
    arguments, want = case(B, T, K, G, H, S, start, dtype, cache)
    assert relative(jax.jit(attention)(*arguments), want) < BOUND[dtype]

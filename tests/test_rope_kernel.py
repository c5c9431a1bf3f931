"""The rope kernels against float64 numpy, and against what the model does in plain jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")

from jaxllm.kernels import reference  # noqa: E402
from jaxllm.kernels.rope import rope, rope_store  # noqa: E402
from jaxllm.quantize import quantize  # noqa: E402

RNG = np.random.default_rng(0)
BOUND = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 1e-3}


def relative(got, want):
    assert got.shape == want.shape and np.isfinite(want).all()
    return np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30)


def float64(array):
    return np.asarray(array, np.float64)


def angles(*shape):
    """cos and sin float32 of angles as large as those of long prompts, and the complex number of each."""
    angle = RNG.uniform(0, 1e4, shape)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return jnp.asarray(cos), jnp.asarray(sin), float64(cos) + 1j * float64(sin)


def rotated(x, turn):
    """x [..., H] in float64, its pairs (i, i + H/2) taken for complex numbers and multiplied."""
    half = x.shape[-1] // 2
    z = (float64(x[..., :half]) + 1j * float64(x[..., half:])) * turn
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 5, 8), (1, 7, 4, 3, 80), (3, 1, 1, 3, 128), (1, 70, 128)])
def test_rope(shape, dtype):
    x = jnp.asarray(RNG.normal(size=shape) * 10, dtype)
    cos, sin, turn = angles(*shape[:2], shape[-1] // 2)
    got = jax.jit(rope)(x, cos, sin)
    turn = turn.reshape(*shape[:2], *(1,) * (len(shape) - 3), -1)
    assert got.dtype == dtype and relative(got, rotated(x, turn)) < BOUND[dtype]
    assert relative(got, float64(reference.rope(x, cos, sin))) < BOUND[dtype]


def test_rope_at_position_0_changes_nothing():
    x = jnp.asarray([[[3e38, -2e-38, 0.0, 65504.0]]])
    np.testing.assert_array_equal(rope(x, jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 2))), x)


def case(B, T, K, G, H, S, dtype, start):
    """Arguments of rope_store but for the cache, positions from start [B] on, and the turn of each pair."""
    qkv = jnp.asarray(RNG.normal(size=(B, T, K, G + 2, H)) * 3, dtype)
    cos, sin, turn = angles(B, T, H // 2)
    positions = jnp.asarray(np.reshape(start, (B, 1)) + np.arange(T), jnp.int32)
    return (qkv, cos, sin, positions), turn[:, :, None, None]


def written(cache, positions, new):
    """A copy of cache [B, K, S, ...] with new [B, T, K, ...] at positions, those that are no slot left out."""
    cache = np.array(cache)
    for b, t in np.ndindex(*positions.shape):
        if 0 <= positions[b, t] < cache.shape[2]:
            cache[b, :, positions[b, t]] = new[b, t]
    return cache


SHAPES = [
    (1, 1, 1, 1, 2, 1, [0]),
    (2, 1, 4, 8, 64, 9, [8, 3]),
    (3, 5, 2, 3, 10, 9, [0, 4, 7]),  # the last row runs out of the cache
    (1, 70, 1, 1, 128, 80, [5]),
    (2, 3, 2, 5, 80, 7, [2, -2]),  # the second row begins with padding
]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("B, T, K, G, H, S, start", SHAPES)
def test_rope_store(B, T, K, G, H, S, start, dtype):
    arguments, turn = case(B, T, K, G, H, S, dtype, start)
    qkv, _, _, positions = arguments
    k, v = (jnp.asarray(RNG.normal(size=(B, K, S, H)), dtype) for _ in "kv")
    got_q, got_k, got_v = jax.jit(rope_store)(*arguments, k, v)
    assert got_q.dtype == got_k.dtype == got_v.dtype == dtype
    turned = rotated(qkv[..., : G + 1, :], turn)
    assert relative(got_q, turned[..., :G, :]) < BOUND[dtype]
    new_k = written(float64(k), positions, turned[..., G, :])
    assert relative(got_k, new_k) < BOUND[dtype]
    free = written(np.ones((B, K, S)), positions, np.zeros((B, T, K))) > 0
    np.testing.assert_array_equal(np.asarray(got_k)[free], np.asarray(k)[free])
    np.testing.assert_array_equal(got_v, written(v, positions, np.asarray(qkv[..., G + 1, :])))


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("B, T, K, G, H, S, start", SHAPES)
def test_rope_store_in_int8(B, T, K, G, H, S, start, dtype):
    arguments, _ = case(B, T, K, G, H, S, dtype, start)
    qkv, *_, positions = arguments
    k, v = (jnp.asarray(RNG.integers(-127, 128, (B, K, S, H)), jnp.int8) for _ in "kv")
    k_scale, v_scale = (jnp.asarray(RNG.uniform(size=(B, K, S)), jnp.float32) for _ in "kv")
    got_q, got_k, got_v, got_k_scale, got_v_scale = jax.jit(rope_store)(*arguments, k, v, k_scale, v_scale)

    # v is copied, so its values are those of the quantizer to the bit
    want = quantize(np.asarray(qkv[..., G + 1, :]))
    np.testing.assert_array_equal(got_v, written(v, positions, want.values))
    np.testing.assert_array_equal(got_v_scale, written(v_scale, positions, want.scale))

    # k is what goes into a float cache, quantized; a compiler may fuse its products in one kernel and not in the other
    float_q, float_k, _ = rope_store(*arguments, *(jnp.zeros(k.shape, dtype) for _ in "kv"))
    assert relative(got_q, float64(float_q)) < 1e-6
    row, stored = np.arange(B)[:, None], np.minimum(positions, S - 1)
    want = quantize(np.asarray(float_k)[row, :, stored])
    np.testing.assert_allclose(got_k_scale, written(k_scale, positions, want.scale), rtol=1e-6)
    difference = np.abs(float64(got_k) - float64(written(k, positions, want.values)))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def quantized(x):
    """rope_store's int8 values [T, H] and scales [T] of v, for x [T, H] as both k and v at position 0's angle."""
    T, H = x.shape
    qkv = jnp.stack([x, x, x], 1)[None, :, None]
    still = jnp.ones((1, T, H // 2)), jnp.zeros((1, T, H // 2)), jnp.arange(T, dtype=jnp.int32)[None]
    cache, scale = jnp.full((1, 1, T, H), 93, jnp.int8), jnp.full((1, 1, T), 5.0)
    _, k, v, k_scale, v_scale = rope_store(qkv, *still, cache, cache, scale, scale)
    np.testing.assert_array_equal(k, v)
    np.testing.assert_array_equal(k_scale, v_scale)
    return np.asarray(v[0, 0]), np.asarray(v_scale[0, 0])


def test_int8_rounds_half_to_even_and_keeps_extremes():
    halves = jnp.arange(-126.5, 127.5)  # 254 of them; the largest sets the scale to 1
    rows = [
        jnp.concatenate([halves, jnp.asarray([127.0, -127.0])]),
        jnp.zeros(256),
        jnp.full(256, 7.25),
        jnp.full(256, -1e38),
        jnp.full(256, 1e-36),  # scale 0: too small
        jnp.full(256, 2e-35),
        jnp.zeros(256).at[255].set(-3e-3),
        jnp.full(256, 5e-36),
    ]
    x = jnp.stack(rows)
    values, scale = quantized(x)
    want = quantize(np.asarray(x))
    np.testing.assert_array_equal(values, want.values)
    np.testing.assert_array_equal(scale, want.scale)
    np.testing.assert_array_equal(values[0, :254], np.rint(np.asarray(halves)))
    assert scale[1] == scale[4] == scale[7] == 0 < scale[5]  # of row 7 it would be a normal number, below the smallest


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_int8_scale_shows_what_is_not_finite(bad, at):
    qkv = jnp.ones((1, 2, 1, 3, 4)).at[0, 0, 0, 2, at].set(bad)
    still = jnp.ones((1, 2, 2)), jnp.zeros((1, 2, 2)), jnp.arange(2, dtype=jnp.int32)[None]
    cache, scale = jnp.zeros((1, 1, 2, 4), jnp.int8), jnp.zeros((1, 1, 2))
    with np.errstate(invalid="ignore"):  # infinity times 0, in the interpreter
        scale = rope_store(qkv, *still, cache, cache, scale, scale)[4]
    assert not np.isfinite(scale[0, 0, 0]) and np.isfinite(scale[0, 0, 1])


def test_rope_store_updates_the_cache_in_place():
    arguments, _ = case(1, 1, 2, 1, 64, 512, "float32", [0])
    cache = [jax.ShapeDtypeStruct((1, 2, 512, 64), "float32")] * 2
    text = jax.jit(rope_store, donate_argnums=(4, 5)).lower(*arguments, *cache).as_text()
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == 2

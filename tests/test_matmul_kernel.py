"""The matmul kernels against float64 sums in numpy, in Triton's interpreter where there is no GPU."""

import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels import matmul as kernels
from jaxllm.kernels import reference

LIMIT = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
GROUP = 128


def random(seed, *shape, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def random_int8(seed, *shape):
    return np.random.default_rng(seed).integers(-128, 128, shape, np.int8)


def positive(seed, *shape):
    return np.random.default_rng(seed).uniform(0.001, 0.02, shape).astype(np.float32)


def expected(x, w, scale=None, norm=None, eps=0.0, residual=None, gated=False, x_scale=None):
    """The product and all that is fused with it, in float64; only a norm's result is rounded, of several rows."""
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    if norm is not None:
        x64 = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + eps) * norm.astype(np.float64)
        if x.size > x.shape[-1]:  # one row is multiplied as it is, in float32
            x64 = x64.astype(np.float32).astype(x.dtype).astype(np.float64)
    if scale is not None:
        columns = np.arange(x.shape[-1]) // GROUP if scale.ndim == w.ndim else None
        w64 = w64 * (scale[..., None] if columns is None else scale[..., columns])
    out = np.tensordot(x64, w64, axes=(-1, -1))
    if x_scale is not None:
        out = out * x_scale.reshape(*x_scale.shape, *(1,) * (w.ndim - 1))
    if gated:
        gate, up = np.moveaxis(out, x.ndim - 1, 0)
        out = gate / (1 + np.exp(-gate)) * up
    return out if residual is None else out + residual.astype(np.float64)


def check(x, w, dtype="float32", limit=None, **fused):
    arrays = {name: value for name, value in fused.items() if isinstance(value, np.ndarray)}
    settings = {name: value for name, value in fused.items() if name not in arrays}
    out = jax.jit(lambda x, w, arrays: kernels.matmul(x, w, **arrays, **settings, dtype=jnp.dtype(dtype)))(x, w, arrays)
    want = expected(x, w, **fused)
    assert out.dtype == dtype and out.shape == want.shape
    limit = limit or max(LIMIT[x.dtype.name], LIMIT[dtype])
    assert np.linalg.norm(np.asarray(out, np.float64) - want) <= limit * np.linalg.norm(want)


@pytest.mark.parametrize("width, outs", [(1, 1), (35, 7), (64, 1), (200, 16), (1056, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_row_of_float_weights(width, outs, dtype):
    check(random(0, 1, width, dtype=dtype), random(1, outs, width, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [35, 36, 300, 4096 + 260])
@pytest.mark.parametrize("scales", ["channel", "group"])
def test_one_row_of_int8_weights(width, scales, dtype):
    scale = positive(2, 9) if scales == "channel" else positive(2, 9, -(-width // GROUP))
    # the result is not rounded, and the kernel multiplies without rounding: float32's limit, whatever x's type
    check(random(0, 1, width, dtype=dtype), random_int8(1, 9, width), scale=scale, limit=1e-5)


@pytest.mark.parametrize(
    "x_dtype, w_dtype", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_one_row_of_mixed_types(x_dtype, w_dtype):
    check(random(0, 1, 1100, dtype=x_dtype), random(1, 5, 1100, dtype=w_dtype), limit=1e-5)


@pytest.mark.parametrize("width", [4, 2048, 2 * 2048, 3 * 2048, 3 * 2048 + 16, 4 * 2048])
def test_blocks_of_one_row(width):
    """From a part of one block to several blocks, with and without a rest."""
    scale = positive(2, 3)
    check(random(0, 1, width), random_int8(1, 3, width), scale=scale)
    check(random(0, 1, width, dtype="bfloat16"), random(1, 3, width, dtype="bfloat16"), limit=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_every_int8_value(rows):
    """Each of the 256 values at each of the four places of a word, in sums that float32 holds exactly."""
    values = np.arange(-128, 128).reshape(64, 4)
    w = np.stack([np.roll(values, 17 * place, axis=0) for place in range(4)], axis=-1).reshape(64, 16)
    x = np.random.default_rng(0).integers(1, 8191, (rows, 16)).astype(np.float32)
    out = kernels.matmul(jnp.asarray(x), jnp.asarray(w, jnp.int8), jnp.ones(64))
    assert np.array_equal(out, x.astype(np.int64) @ w.T)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["float", "channel", "group"])
@pytest.mark.parametrize("gated", [False, True])
def test_everything_fused(rows, dtype, kind, gated):
    width, axes = 260, (2, 11) if gated else (2, 3, 4)
    w = random(1, *axes, width, dtype=dtype) * np.array(0.1, dtype) if kind == "float" else random_int8(1, *axes, width)
    scale = {"float": None, "channel": positive(2, *axes), "group": positive(2, *axes, 3)}[kind]
    fused = {} if scale is None else {"scale": scale}
    residual = random(4, rows, *axes[1 if gated else 0 :], dtype=dtype)
    norm = random(3, width, dtype=dtype)
    x = 3 * random(0, rows, width, dtype=dtype)
    check(x, w, dtype, norm=norm, eps=0.1, residual=residual, gated=gated, **fused)


@pytest.mark.parametrize("rows, limit", [(1, 1e-6), (2, 3e-5)])
def test_norm_is_rounded_for_several_rows_only(rows, limit):
    x, w, norm = random(0, rows, 600, dtype="float16"), random(1, 8, 600, dtype="float16"), random(2, 600)
    check(x, w, norm=norm, eps=1e-5, limit=limit)  # one way for the other makes 2e-4


@pytest.mark.parametrize("rows", [2, 16, 70])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["float", "channel", "group"])
def test_several_rows(rows, dtype, kind):
    width, outs = 300, 37
    w = random(1, outs, width, dtype=dtype) if kind == "float" else random_int8(1, outs, width)
    scale = {"float": None, "channel": positive(2, outs), "group": positive(2, outs, 3)}[kind]
    check(random(0, rows, width, dtype=dtype), w, **({} if scale is None else {"scale": scale}))


@pytest.mark.parametrize("shape", [(3, 35, 7), (2, 1, 1), (33, 35, 130), (130, 64, 140), (130, 40, 580)])
def test_odd_tiles(shape):
    rows, width, outs = shape
    check(random(0, rows, width), random(1, outs, width))
    check(random(0, rows, width, dtype="float16"), random_int8(1, outs, width), scale=positive(2, outs))


def test_many_rows_fused():
    scale, residual = positive(2, 2, 70), random(3, 2, 70, 70, dtype="float16")
    x, w = random(0, 2, 70, 96, dtype="float16"), random_int8(1, 2, 70, 96)
    check(x, w, "float16", scale=scale, residual=residual, gated=True)


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["float", "channel", "group", "w8a8"])
def test_sums_in_parts(rows, gated, kind):
    """Rows of weights so long that several programs share one; the last part is shorter."""
    width, axes = 3 * 1024 + 200, (2, 21) if gated else (37,)
    residual = random(4, rows, axes[-1], dtype="float16")
    if kind == "w8a8":
        x, w, x_scale, scale = (
            random_int8(0, rows, width),
            random_int8(1, *axes, width),
            positive(2, rows),
            positive(3, *axes),
        )
        out = kernels.w8a8_matmul(*map(jnp.asarray, (x, x_scale, w, scale * 0.01, residual)), gated=gated)
        want = expected(x, w, scale * 0.01, x_scale=x_scale, residual=residual, gated=gated)
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
        return
    w = random(1, *axes, width, dtype="float16") if kind == "float" else random_int8(1, *axes, width)
    scale = {"float": None, "channel": positive(2, *axes), "group": positive(2, *axes, -(-width // GROUP))}[kind]
    x = random(0, rows, width, dtype="float16") * np.float16(0.05)
    check(x, w, residual=residual, gated=gated, **({} if scale is None else {"scale": scale}), limit=2e-4)


def test_axes():
    """x of several leading axes, w of several output axes."""
    check(random(0, 2, 3, 40), random(1, 2, 3, 5, 40), residual=random(2, 2, 3, 2, 3, 5))
    check(random(0, 40), random(1, 2, 3, 40))
    check(random(0, 1, 1, 40), random(1, 2, 6, 40), gated=True)


@pytest.mark.parametrize("rows", [1, 4])
def test_extreme_numbers(rows):
    width, outs = 264, 5
    same = np.full((rows, width), 2.0, np.float32)
    check(same, np.full((outs, width), -0.5, np.float32))
    x = random(0, rows, width)
    for power in (1e-30, 1e30):
        check(x * np.float32(power), random(1, outs, width))
        check(x * np.float32(power), random_int8(1, outs, width), scale=positive(2, outs))
    none = kernels.matmul(jnp.asarray(x), jnp.asarray(random_int8(1, outs, width)), jnp.zeros(outs))
    assert not np.asarray(none).any()
    zero = kernels.matmul(
        jnp.zeros((rows, width)), jnp.asarray(w := random(1, outs, width)), norm=jnp.ones(width), eps=1e-5
    )
    assert not np.asarray(zero).any()
    infinite = np.asarray(kernels.matmul(jnp.asarray(x).at[0, 3].set(jnp.inf), jnp.asarray(w)))
    assert np.array_equal(infinite[0], np.sign(w[:, 3]) * np.inf) and np.isfinite(infinite[1:]).all()
    # silu of a large negative gate is zero, of a large positive gate the gate
    gates = np.array([[-500, 500], [2, 2]], np.float32)[..., None] * np.ones(width, np.float32)
    check(np.full((rows, width), 1 / width, np.float32), gates, gated=True)


@pytest.mark.parametrize("rows", [1, 3, 16, 33, 130])
@pytest.mark.parametrize("width, outs", [(35, 7), (256, 130)])
def test_w8a8(rows, width, outs):
    x, w, x_scale, scale = (
        random_int8(0, rows, width),
        random_int8(1, outs, width),
        positive(2, rows),
        positive(3, outs),
    )
    residual = random(4, rows, outs)
    out = jax.jit(kernels.w8a8_matmul)(x, x_scale, w, scale, residual)
    want = expected(x, w, scale, x_scale=x_scale, residual=residual)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_w8a8_axes_and_type(gated):
    x, w, x_scale, scale = random_int8(0, 2, 3, 32), random_int8(1, 2, 5, 32), positive(2, 2, 3), positive(3, 2, 5)
    out = kernels.w8a8_matmul(*map(jnp.asarray, (x, x_scale, w, scale)), gated=gated, dtype=jnp.float16)
    assert out.dtype == jnp.float16 and out.shape == ((2, 3, 5) if gated else (2, 3, 2, 5))
    np.testing.assert_allclose(out, expected(x, w, scale, x_scale=x_scale, gated=gated), rtol=2e-3, atol=1e-6)


def test_w8a8_sums_are_exact():
    """Sums beyond what float32 holds exactly: 2^14 products of 127 and 127, and one that makes the sum odd."""
    width = 2**14
    x, w = np.full((2, width), 127, np.int8), np.full((3, width), 127, np.int8)
    w[1, 0], w[2] = 126, -128
    out = np.asarray(kernels.w8a8_matmul(jnp.asarray(x), jnp.ones(2), jnp.asarray(w), jnp.ones(3)))
    assert np.array_equal(out, (x.astype(np.int64) @ w.astype(np.int64).T).astype(np.float32))


@pytest.mark.parametrize("rows", [1, 5])
def test_against_the_specification(rows):
    x, w, scale, norm = random(0, rows, 260), random_int8(1, 2, 6, 260), positive(2, 2, 6, 3), random(3, 260)
    out = kernels.matmul(*map(jnp.asarray, (x, w, scale, norm)), eps=1e-5, gated=True)
    want = reference.int8_matmul(x, jnp.asarray(w), scale, norm=norm, eps=1e-5, gated=True)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
    q, x_scale = random_int8(5, rows, 260), positive(6, rows)
    np.testing.assert_allclose(
        kernels.w8a8_matmul(*map(jnp.asarray, (q, x_scale, w, scale[..., 0]))),
        reference.w8a8_matmul(q, x_scale, jnp.asarray(w), scale[..., 0]),
        rtol=1e-5,
    )


def test_norm_of_many_rows():
    check(random(0, 17, 40), random(1, 9, 40), norm=random(2, 40), eps=0.1)


# wqkv and w_down of 1.1B, w_gate_up, w_down and an output matrix of 7B, w_gate_up of 70B
SHAPES = [(2560, 2048), (2048, 5632), (2, 11008, 4096), (4096, 11008), (32000, 4096), (2, 28672, 8192)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 64, 300])
@pytest.mark.parametrize("kind", ["bfloat16", "channel", "group", "w8a8"])
def test_model_shapes(shape, rows, kind):
    """Real sizes and bfloat16 dots, against float32 products in jax."""
    keys = jax.random.split(jax.random.key(0), 6)
    *axes, width = shape
    x = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
    scale = None
    if kind == "bfloat16":
        w = jax.random.normal(keys[1], shape, jnp.bfloat16) * width**-0.5
    else:
        w = jax.random.randint(keys[1], shape, -128, 128, jnp.int8)
        scale = jax.random.uniform(keys[2], (*axes, width // GROUP) if kind == "group" else axes) * width**-0.5 / 64
    norm, residual = jax.random.normal(keys[3], (width,)), jax.random.normal(keys[4], (rows, axes[-1]))
    gated, fused = len(axes) == 2, {}
    if kind == "w8a8":
        x = jax.random.randint(keys[0], (rows, width), -128, 128, jnp.int8)
        x_scale = jax.random.uniform(keys[5], (rows,))
        out = kernels.w8a8_matmul(x, x_scale, w, scale, gated=gated)
        want = reference.w8a8_matmul(x, x_scale, w, scale, gated=gated)
    else:
        if rows <= 16:
            fused = {"norm": norm, "eps": 1e-5}
        out = kernels.matmul(x, w, scale, **fused, residual=residual, gated=gated)
        w32 = w.astype(jnp.float32) if scale is None else reference.dequantize(w, scale)
        if rows == 1:
            x = x.astype(jnp.float32)  # the kernel does not round the norm's result
        x32 = (reference.rms_norm(x, norm, 1e-5) if fused else x).astype(jnp.float32)
        want = reference.matmul(x32, w32, residual=residual, gated=gated)
    assert jnp.linalg.norm(out - want) <= 2e-4 * jnp.linalg.norm(want)

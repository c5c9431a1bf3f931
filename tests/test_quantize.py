"""Quantization against float64, numpy against jax bit for bit, and the products that each scheme defines."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm import ops
from jaxllm.model import Layer, Params, quantize_params
from jaxllm.quantize import SCHEMES, column_fill, column_gain, dequantize, divide_up, quantize, rotate
from jaxllm.tensor import QTensor

TINY = 2.0**-126  # the smallest normal float32
ON_CPU = pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="GPUs round a quotient otherwise")


def weights(seed, *shape, dtype=np.float32, group=None):
    """Rows whose sizes differ by many powers of two, and so do those of their groups; as float `dtype`."""
    rng = np.random.default_rng(seed)
    group = group or shape[-1]
    sizes = 2.0 ** rng.integers(-8, 9, (*shape[:-1], -(-shape[-1] // group)))
    return (rng.standard_normal(shape) * sizes.repeat(group, axis=-1)[..., : shape[-1]]).astype(dtype)


CASES = {
    "matrix": weights(0, 40, 64),
    "odd": weights(1, 7, 33),
    "one input": weights(2, 9, 1),
    "one row": weights(3, 1, 5),
    "three axes": weights(4, 2, 5, 24),
    "wqkv": weights(5, 3, 4, 6, 17),
    "vector": weights(6, 50),
    "bfloat16": weights(7, 31, 65, dtype=ml_dtypes.bfloat16),
    "float16": weights(8, 31, 65, dtype=np.float16),
    "many": weights(9, 300, 500),
    "rows of zeros": weights(10, 6, 8) * np.array([1, 0, 1, 0, 0, 1], np.float32)[:, None],
    "all zeros": np.zeros((4, 8), np.float32),
    "negative zeros": -np.zeros((4, 8), np.float32),
    # a scale of exactly 2: half-way values go to the even neighbour
    "ties": np.array([[254, 1, 3, 5, -1, -3, -5, 253], [-254, 7, 9, 11, -7, -9, -11, 0]], np.float32),
    "large": np.array([[3e38, -3e38, 1e38, 1e30], [1, 2, 3, 4]], np.float32),
    "a short group": weights(13, 6, 127),
    "one group": weights(14, 2, 3, 128),
    "a group of one": weights(15, 5, 129, group=128),
    "groups": weights(16, 3, 4, 300, group=128),
    "groups of bfloat16": weights(17, 2, 1, 3, 256, dtype=ml_dtypes.bfloat16, group=128),
    "groups of float16": weights(18, 300, group=128).astype(np.float16),
    "groups of zeros": np.where(np.arange(300) // 128 == np.array([[0], [1], [2]]), 0, weights(19, 3, 300, group=128)),
    "ties in groups": np.pad([[254, 1, 3, 5, -1, -3, -5, 253]], [(0, 0), (150, 5)]).astype(np.float32),
}
# XLA takes denormal numbers for 0, on CPUs too
DENORMAL = {
    "denormal": weights(11, 20, 9) * np.float32(1e-41),
    "denormal beside normal": np.array([[TINY / 2, 1.0], [TINY / 2, TINY * 2], [TINY * 0.9, TINY * 127]], np.float32),
    "denormal scales": weights(12, 200, 9) * np.float32(1e-36),
}


def hadamard(size):
    """The rotation of `size` inputs as a matrix in float64: Kronecker products of [[1, 1], [1, -1]], block by block."""
    block = max(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if size % n == 0)
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return np.kron(np.eye(size // block), matrix) / math.sqrt(block)


def by_scale(values, scale, w, scheme):
    """What shares a scale: (values, scale, w in float64) of the whole weight, or of each group of 128 inputs."""
    size = w.shape[-1]
    width = 128 if scheme == "int8-g128" else size
    scale = scale if scheme == "int8-g128" else scale[..., None]
    starts = range(0, size, width)
    assert values.shape == w.shape and scale.shape == (*w.shape[:-1], len(starts))
    for i, start in enumerate(starts):
        cut = np.s_[..., start : start + width]
        yield values[cut], scale[..., i], w[cut].astype(np.float64)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, scheme):
    if (name, scheme) == ("large", "w8a8"):
        pytest.skip("the sum over a block is beyond float32")
    w, near = CASES[name], 1e-4
    q = quantize(w, scheme)
    assert q.values.dtype == np.int8 and q.scale.dtype == np.float32
    assert q.shape == w.shape and q.int8_inputs == (scheme == "w8a8")
    if scheme == "w8a8":
        w, near = w.astype(np.float64) @ hadamard(w.shape[-1]), 1e-3
    for values, scale, exact in by_scale(q.values, q.scale, w, scheme):
        peak = np.abs(exact).max(axis=-1)
        np.testing.assert_allclose(scale, peak / 127, rtol=2**-22 if scheme != "w8a8" else 1e-6)  # float32: 2**-24
        levels = exact / np.where(peak > 0, peak / 127, 1)[..., None]
        assert np.abs(values - levels).max() <= 0.5 + near
        clear = np.abs(levels - np.floor(levels) - 0.5) > near  # not half-way between two levels
        np.testing.assert_array_equal(values[clear], np.rint(levels)[clear])
        assert np.abs(values.astype(int)).max(axis=-1)[peak > 0].min(initial=127) == 127
        assert not scale[peak == 0].any() and not values[peak == 0].any()


def test_rounds_half_to_even():
    values = quantize(CASES["ties"]).values
    assert values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126], [-127, 4, 4, 6, -4, -4, -6, 0]]
    values = quantize(CASES["ties in groups"], "int8-g128").values
    assert values[:, 150:158].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]] and not values[:, :150].any()


def check_same_bits(ours, theirs):
    assert isinstance(ours.values, np.ndarray) and isinstance(theirs.values, jax.Array)
    np.testing.assert_array_equal(ours.values, theirs.values, strict=True)
    np.testing.assert_array_equal(ours.scale.view(np.uint32), np.asarray(theirs.scale).view(np.uint32), strict=True)


@ON_CPU
def test_numpy_and_jax_agree_bit_for_bit():
    cases = CASES | DENORMAL
    schemes = {name: "int8-g128" if "group" in name else "int8" for name in cases}
    compiled = jax.jit(lambda weights: {name: quantize(w, schemes[name]) for name, w in weights.items()})(cases)
    for name, w in cases.items():
        check_same_bits(quantize(w, schemes[name]), compiled[name])


@ON_CPU
@pytest.mark.parametrize("name, scheme", [("wqkv", "int8"), ("denormal scales", "int8"), ("groups", "int8-g128")])
def test_numpy_and_jax_agree_without_jit(name, scheme):
    w = (CASES | DENORMAL)[name]
    check_same_bits(quantize(w, scheme), quantize(jnp.asarray(w), scheme))


@pytest.mark.parametrize("scheme", ["int8", "int8-g128"])
@pytest.mark.parametrize("w", DENORMAL.values(), ids=DENORMAL)
def test_what_is_next_to_nothing(w, scheme):
    q = quantize(w, scheme)
    scale = q.scale.reshape(*w.shape[:-1], 1)
    assert not ((scale > 0) & (scale < TINY)).any()  # scales that JAX would take for 0
    np.testing.assert_allclose(q.values * scale.astype(np.float64), w, atol=2e-35, rtol=0.5 / 127)


@pytest.mark.parametrize(
    "name, scheme",
    [("matrix", "int8"), ("wqkv", "int8"), ("bfloat16", "int8"), ("groups", "int8-g128"), ("groups", "w8a8")],
)
def test_symmetric_and_stable(name, scheme):
    w = CASES[name]
    q = quantize(w, scheme)
    np.testing.assert_array_equal(quantize(-w, scheme).values, -q.values)
    again = quantize(np.asarray(dequantize(q)), scheme)
    np.testing.assert_array_equal(again.values, q.values)
    np.testing.assert_allclose(again.scale, q.scale, rtol=2**-22 if scheme != "w8a8" else 1e-6)
    # rows by themselves give what the whole gives: conversion quantizes block by block
    rows = w.reshape(-1, w.shape[-1])
    parts = [quantize(rows[i : i + 7], scheme) for i in range(0, len(rows), 7)]
    np.testing.assert_array_equal(np.concatenate([p.values for p in parts]).reshape(w.shape), q.values)
    np.testing.assert_array_equal(np.concatenate([p.scale for p in parts]).reshape(q.scale.shape), q.scale)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, where the rotation adds inf and -inf
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_not_finite(bad, dtype, scheme):
    w = np.ones((3, 300), dtype)
    w[1, 130] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(w, scheme)


def test_not_finite_in_jax():
    w = jnp.ones((5, 300)).at[[1, 2, 3], 130].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    found = [np.isfinite(q.scale) for q in jax.jit(lambda w: [quantize(w, scheme) for scheme in SCHEMES])(w)]
    good = np.array([True, False, False, False, True])
    for finite, want in zip(found, [good, np.stack([good | True, good, good | True], axis=-1), good], strict=True):
        np.testing.assert_array_equal(finite, want)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dequantize(dtype, scheme):
    for w in (CASES["wqkv"], CASES["groups"]):
        q = quantize(w, scheme)
        back = dequantize(q, dtype)
        assert back.dtype == dtype and back.shape == w.shape
        want = dequantized(q, scheme)
        if scheme == "w8a8":
            want = want @ hadamard(w.shape[-1])
        atol = 1e-6 * np.abs(want).max() if scheme == "w8a8" else 3e-8  # that is half a denormal float16
        np.testing.assert_allclose(np.asarray(back, np.float64), want, rtol=jnp.finfo(dtype).eps, atol=atol)


def dequantized(q, scheme):
    """Values times scales in float64, not rotated back."""
    parts = by_scale(q.values, q.scale, q.values, scheme)
    return np.concatenate([values * scale[..., None].astype(np.float64) for values, scale, _ in parts], axis=-1)


def relative(got, want):
    assert got.shape == want.shape
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def test_rotate_is_a_block_hadamard_matrix():
    rng = np.random.default_rng(20)
    types = np.float32, ml_dtypes.bfloat16, np.float16
    xs = [rng.standard_normal((2, 3, n)).astype(t) for n in (1, 2, 35, 300, 64 * 9, 128, 128 * 3) for t in types]
    compiled = jax.jit(lambda xs: jax.tree.map(rotate, xs))(xs)
    for x, theirs in zip(xs, compiled, strict=True):
        matrix = hadamard(x.shape[-1])
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-12)
        ours, want = rotate(x), x.astype(np.float64) @ matrix
        assert isinstance(ours, np.ndarray) and isinstance(theirs, jax.Array)
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_allclose(ours, want, atol=1e-6)
        np.testing.assert_allclose(theirs, want, atol=1e-6)
        assert relative(rotate(ours), x.astype(np.float64)) < 1e-6  # its own inverse
        w = rng.standard_normal((7, x.shape[-1])).astype(np.float32)
        assert relative(ours @ rotate(w).T, x.astype(np.float64) @ w.T) < 1e-6 * math.sqrt(len(matrix))


@pytest.mark.parametrize(
    "rows, dtype, size",
    [((1,), "float32", 300), ((1,), "bfloat16", 256), ((2, 1), "float32", 35), ((2, 5), "bfloat16", 300)],
)
def test_w8a8_product_is_what_its_definition_says(rows, dtype, size):
    rng = np.random.default_rng(21)
    x = jnp.asarray(rng.standard_normal((*rows, size)) * 3, dtype).at[..., 0, :7].mul(50)
    w = quantize(rng.standard_normal((2, 9, size)).astype(np.float32), "w8a8")
    rotated = np.asarray(x, np.float64) @ hadamard(size)
    scale = np.abs(rotated).max(axis=-1, keepdims=True) / 127
    want = np.tensordot(np.rint(rotated / scale) * scale, dequantized(w, "w8a8"), (-1, -1))
    got = jax.jit(ops.matmul)(x, jax.tree.map(jnp.asarray, w))
    assert got.dtype == jnp.float32
    assert relative(got, want) < 1e-6  # an activation that is rounded the other way: 1e-4


def test_rotation_makes_outliers_harmless():
    """Activations as in a LLaMA: a few columns are a hundred times as large as the others."""
    rng = np.random.default_rng(22)
    x, w = rng.standard_normal((64, 1024)).astype(np.float32), rng.standard_normal((50, 1024)).astype(np.float32)
    x[:, [3, 200, 900]] *= 100
    want = x.astype(np.float64) @ w.T
    plain = dequantized(quantize(x), "int8") @ dequantized(quantize(w), "int8").T
    got = jax.jit(ops.matmul)(jnp.asarray(x), jax.tree.map(jnp.asarray, quantize(w, "w8a8")))
    assert relative(got, want) < relative(plain, want) / 2  # measured: 6.2 times smaller


@pytest.mark.parametrize("scheme, dtype", [("int8", "bfloat16"), ("int8-g128", "float32"), ("int8-g128", "bfloat16")])
def test_embed_looks_rows_up(dtype, scheme):
    table = quantize(weights(23, 20, 300, group=128), scheme)
    tokens = np.array([[3, 0, 19], [3, 7, 11]])
    got = ops.embed(tokens, jax.tree.map(jnp.asarray, table), dtype)
    assert got.dtype == dtype
    want = dequantized(table, scheme)[tokens]
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=jnp.finfo(dtype).eps)


def test_embed_turns_rows_of_a_rotated_table_back():
    table = quantize(weights(24, 20, 300), "w8a8")
    got = ops.embed(np.array([3, 0, 19]), jax.tree.map(jnp.asarray, table), "float32")
    assert relative(got, dequantized(table, "w8a8")[[3, 0, 19]] @ hadamard(300)) < 1e-6


def test_unknown_schemes_are_refused():
    for w in (CASES["matrix"], jnp.asarray(CASES["matrix"])):
        with pytest.raises(ValueError, match="'int4' is unknown; there are int8, int8-g128, w8a8"):
            quantize(w, "int4")


@ON_CPU
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_column_gains_leave_every_scale_as_it_is(dtype):
    rng = np.random.default_rng(25)
    w = weights(26, 37, 90, dtype=dtype) * np.exp2(rng.integers(-3, 1, 90)).astype(dtype)
    w[:, 8] *= 0.001
    w[5], w[:, 7] = 0, 0
    fill = column_fill(w)
    np.testing.assert_array_equal(np.maximum(column_fill(w[:11]), column_fill(w[11:])), fill)  # block by block
    gain = column_gain(fill)
    exact = np.abs(w.astype(np.float64))
    peak = exact.max(axis=1, keepdims=True)
    want = np.clip(1 / np.maximum((exact / np.where(peak > 0, peak, 1)).max(axis=0), 1e-9), 1, 16)
    np.testing.assert_allclose(gain, want, rtol=1e-6)
    assert gain[7] == gain[8] == 16 and (gain > 1.05).sum() > 20
    np.testing.assert_allclose(quantize(w.astype(np.float32) * gain).scale, quantize(w).scale, rtol=1e-6)
    in_jax = jax.jit(lambda w: column_gain(column_fill(w)))(w)
    np.testing.assert_array_equal(gain.view(np.uint32), np.asarray(in_jax).view(np.uint32))


def test_rows_of_up_are_divided():
    rng = np.random.default_rng(27)
    q = quantize(rng.standard_normal((2, 9, 16)).astype(np.float32) * np.array([1, 3e-36])[:, None, None])
    q.scale[1, :3] = 1.0, 0, 3.0
    gain = rng.uniform(1, 16, 9).astype(np.float32)
    got = divide_up(q, gain)
    assert got.values is q.values
    want = np.maximum(q.scale / [np.ones(9), gain], np.minimum(q.scale, 1e-37))
    np.testing.assert_allclose(got.scale, want, rtol=1e-6)
    flat = QTensor(q.values.reshape(18, 16), q.scale.reshape(18))
    parts = [divide_up(QTensor(flat.values[i : i + 7], flat.scale[i : i + 7]), gain, i).scale for i in (0, 7, 14)]
    np.testing.assert_array_equal(np.concatenate(parts).reshape(2, 9), got.scale)


def test_equalized_ffn_is_the_same_and_closer():
    """The float product, in float64, of what the int8 weights stand for, against that of each rounded by itself."""
    rng = np.random.default_rng(28)
    gate_up, down = rng.standard_normal((2, 96, 40)), rng.standard_normal((40, 96)) * rng.uniform(0.1, 1, 96)
    layer = Layer(np.ones(40), np.ones((1, 3, 8, 40), np.float32), np.ones((40, 8), np.float32), np.ones(40),
                  gate_up.astype(np.float32), down.astype(np.float32))  # fmt: skip
    ours = quantize_params(Params(np.ones((4, 40), np.float32), (layer,), np.ones(40), None), "int8").layers[0]
    x = rng.standard_normal((200, 40))

    def ffn(gate_up, down):
        gate, up = x @ gate_up[0].T, x @ gate_up[1].T
        return (gate / (1 + np.exp(-gate)) * up) @ down.T

    exact = ffn(layer.w_gate_up.astype(np.float64), layer.w_down.astype(np.float64))
    up = dequantize(ours.w_gate_up).astype(np.float64)
    # up as it was: what is left is w_down's error
    fill = np.abs(down / np.abs(down).max(axis=1, keepdims=True)).max(axis=0)
    restored = layer.w_gate_up.astype(np.float64) * np.stack([np.ones(96), np.maximum(fill, 1 / 16)])[..., None]
    alone = dequantize(quantize(layer.w_down)).astype(np.float64)
    equalized = relative(ffn(restored, dequantize(ours.w_down).astype(np.float64)), exact)
    assert equalized < 0.8 * relative(ffn(layer.w_gate_up.astype(np.float64), alone), exact)
    assert relative(ffn(up, dequantize(ours.w_down).astype(np.float64)), exact) < 0.02

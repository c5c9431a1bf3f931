"""Quantization against float64, and numpy against jax bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.quantize import dequantize, quantize

TINY = 2.0**-126  # the smallest normal float32
ON_CPU = pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="GPUs round a quotient otherwise")


def weights(seed, *shape, dtype=np.float32):
    """Rows whose sizes differ by many powers of two, as float `dtype`."""
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** rng.integers(-8, 9, shape[:-1])[..., None]
    return (rng.standard_normal(shape) * sizes).astype(dtype)


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
}
# XLA takes denormal numbers for 0, on CPUs too
DENORMAL = {
    "denormal": weights(11, 20, 9) * np.float32(1e-41),
    "denormal beside normal": np.array([[TINY / 2, 1.0], [TINY / 2, TINY * 2], [TINY * 0.9, TINY * 127]], np.float32),
    "denormal scales": weights(12, 200, 9) * np.float32(1e-36),
}


@pytest.mark.parametrize("w", CASES.values(), ids=CASES)
def test_against_float64(w):
    q = quantize(w)
    assert q.values.dtype == np.int8 and q.scale.dtype == np.float32
    assert q.values.shape == q.shape == w.shape and q.scale.shape == w.shape[:-1]
    exact = w.astype(np.float64)
    peak = np.abs(exact).max(axis=-1)
    np.testing.assert_allclose(q.scale, peak / 127, rtol=2**-22)  # float32 keeps 2**-24
    levels = exact / np.where(peak > 0, peak / 127, 1)[..., None]
    assert np.abs(q.values - levels).max() <= 0.5 + 1e-4
    clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-4  # not half-way between two levels
    np.testing.assert_array_equal(q.values[clear], np.rint(levels)[clear])
    assert np.abs(q.values.astype(int)).max(axis=-1)[peak > 0].min(initial=127) == 127
    assert not q.scale[peak == 0].any() and not q.values[peak == 0].any()
    np.testing.assert_array_equal(dequantize(q), q.values.astype(np.float32) * q.scale[..., None])


def test_rounds_half_to_even():
    values = quantize(CASES["ties"]).values
    assert values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126], [-127, 4, 4, 6, -4, -4, -6, 0]]


def check_same_bits(ours, theirs):
    assert isinstance(ours.values, np.ndarray) and isinstance(theirs.values, jax.Array)
    np.testing.assert_array_equal(ours.values, theirs.values, strict=True)
    np.testing.assert_array_equal(ours.scale.view(np.uint32), np.asarray(theirs.scale).view(np.uint32), strict=True)


@ON_CPU
def test_numpy_and_jax_agree_bit_for_bit():
    cases = CASES | DENORMAL
    compiled = jax.jit(lambda weights: {name: quantize(w) for name, w in weights.items()})(cases)
    for name, w in cases.items():
        check_same_bits(quantize(w), compiled[name])


@ON_CPU
@pytest.mark.parametrize("name", ["wqkv", "denormal scales"])
def test_numpy_and_jax_agree_without_jit(name):
    w = (CASES | DENORMAL)[name]
    check_same_bits(quantize(w), quantize(jnp.asarray(w)))


@pytest.mark.parametrize("w", DENORMAL.values(), ids=DENORMAL)
def test_what_is_next_to_nothing(w):
    q = quantize(w)
    assert not ((q.scale > 0) & (q.scale < TINY)).any()  # scales that JAX would take for 0
    np.testing.assert_allclose(q.values * q.scale[..., None].astype(np.float64), w, atol=2e-35, rtol=0.5 / 127)


@pytest.mark.parametrize("w", [CASES["matrix"], CASES["wqkv"], CASES["bfloat16"]], ids=["matrix", "wqkv", "bfloat16"])
def test_symmetric_and_stable(w):
    q = quantize(w)
    np.testing.assert_array_equal(quantize(-w).values, -q.values)
    again = quantize(np.asarray(dequantize(q)))
    np.testing.assert_array_equal(again.values, q.values)
    np.testing.assert_allclose(again.scale, q.scale, rtol=2**-22)
    # rows by themselves give what the whole gives: conversion quantizes block by block
    rows = w.reshape(-1, w.shape[-1])
    parts = [quantize(rows[i : i + 7]) for i in range(0, len(rows), 7)]
    np.testing.assert_array_equal(np.concatenate([p.values for p in parts]).reshape(w.shape), q.values)
    np.testing.assert_array_equal(np.concatenate([p.scale for p in parts]).reshape(q.scale.shape), q.scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_not_finite(bad, dtype):
    w = np.ones((3, 4), dtype)
    w[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dequantize(dtype):
    w = CASES["wqkv"]
    q = quantize(w)
    back = dequantize(q, dtype)
    assert back.dtype == dtype and back.shape == w.shape
    half_a_level = np.abs(w).max(axis=-1, keepdims=True) / 127 / 2
    assert (np.abs(np.asarray(back, np.float64) - w) <= half_a_level * (1.001 + 256 * jnp.finfo(dtype).eps)).all()

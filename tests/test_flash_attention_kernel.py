"""The attention kernel for Hopper against float64 numpy, on a GPU or emulated."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton", reason="the emulator's threads are those for Triton's kernels")

import mosaic_emulator  # noqa: E402
from test_attention_kernel import relative, softmax_sum  # noqa: E402

from jaxllm.kernels import flash_attention as module  # noqa: E402

RNG = np.random.default_rng(0)
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
BOUND = {"bfloat16": 4e-3, "float16": 6e-4}  # of what is rounded to 8 and 11 bits, twice


def case(B, T, K, G, H, S, start, padding=0, dtype="bfloat16"):
    """Arguments of attention, free slots full of NaN and the last tokens of each row padding; the result in float64."""
    positions = np.reshape(start, (B, 1)) + np.arange(T)
    positions[:, T - padding :] = -1
    q = RNG.normal(size=(B, T, K, G, H)).astype(TYPES[dtype])
    k, v = ((RNG.normal(size=(B, K, S, H)) * 2).astype(TYPES[dtype]) for _ in "kv")
    want = softmax_sum(q, k, v, np.maximum(positions, 0))
    free = np.arange(S) > positions.max(1, keepdims=True)
    k, v = (np.where(free[:, None, :, None], np.nan, a).astype(a.dtype) for a in (k, v))
    return (q, k, v, positions.astype(np.int32)), want


def emulated(seed, *arguments, **constants):
    return mosaic_emulator.load(module, seed, **constants).attention(*arguments)


SHAPES = [
    # B, T, K, G, H, S, start, padding
    (1, 8, 1, 1, 64, 8, [0], 0),
    (1, 128, 1, 1, 64, 256, [10], 0),  # k and v end within a block, q fills a tile
    (1, 256, 1, 2, 64, 512, [200], 0),
    (2, 136, 1, 3, 64, 200, [3, 60], 0),  # rows of the batch at different places, the last tile has 8 queries
    (2, 264, 1, 1, 64, 704, [300, 17], 70),
    (1, 160, 1, 1, 128, 512, [350], 0),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("B, T, K, G, H, S, start, padding", SHAPES)
def test_emulated(B, T, K, G, H, S, start, padding, seed):
    arguments, want = case(B, T, K, G, H, S, start, padding)
    got = emulated(seed, *arguments)
    assert got.dtype == arguments[0].dtype and np.isfinite(got.astype(np.float32)).all()
    assert relative(got[:, : T - padding], want[:, : T - padding]) < BOUND["bfloat16"]


@pytest.mark.parametrize("stages", [1, 3])
def test_emulated_stages(stages):
    arguments, want = case(1, 144, 1, 1, 64, 600, [440])
    assert relative(emulated(0, *arguments, STAGES=stages), want) < BOUND["bfloat16"]


@pytest.mark.parametrize("programs", [1, 2, 100])
def test_heads_that_are_under_way_at_once(programs):
    arguments, want = case(2, 8, 4, 1, 64, 16, [0, 5])
    assert relative(emulated(0, *arguments, PROGRAMS=programs), want) < BOUND["bfloat16"]


def test_positions_in_any_order_and_beyond_the_last_slot():
    (q, k, v, _), _ = case(1, 128, 1, 1, 64, 192, [64])
    positions = RNG.permutation(128).astype(np.int32)[None] + 100
    k, v = np.nan_to_num(k), np.nan_to_num(v)
    want = softmax_sum(q, k, v, np.minimum(positions, 191))
    assert relative(emulated(0, q, k, v, positions), want) < BOUND["bfloat16"]


def test_equal_and_huge_scores():
    v = RNG.normal(size=(1, 1, 256, 64)).astype(np.float16)
    positions = np.arange(128, 256, dtype=np.int32)[None]
    q, k = np.ones((1, 128, 1, 1, 64), np.float16), np.ones((1, 1, 256, 64), np.float16)
    means = np.cumsum(v[0, 0].astype(np.float64), 0) / np.arange(1, 257)[:, None]
    for size in (0, 1, 1e3, -1e3):
        flat = emulated(0, q * np.float16(size), k, v, positions)
        assert relative(flat[0, :, 0, 0], means[128:]) < BOUND["float16"]
    for sign in (1, -1):
        # slot 2 has the one score that is not 0: so high that it takes all, or so low that it gets nothing
        k = np.zeros((1, 1, 256, 64), np.float16)
        k[0, 0, 2] = sign * 1e4
        sharp = emulated(0, q * np.float16(1e4), k, v, positions)[0, :, 0, 0]
        rest = (means * np.arange(1, 257)[:, None] - v[0, 0, 2]) / np.arange(256)[:, None].clip(1)
        want = np.broadcast_to(v[0, 0, 2], sharp.shape) if sign > 0 else rest[128:]
        assert relative(sharp, want.astype(np.float64)) < BOUND["float16"]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10's Pallas has another `load`")
@pytest.mark.parametrize("T, K, G, H, S, dtype", [(8, 1, 1, 64, 8, "float16"), (2048, 8, 2, 128, 4096, "bfloat16")])
def test_lowers(T, K, G, H, S, dtype):
    """Without a GPU: that Pallas takes the kernel as it is."""
    q, cache = jax.ShapeDtypeStruct((1, T, K, G, H), dtype), jax.ShapeDtypeStruct((1, K, S, H), dtype)
    lowered = module.attention.trace(q, cache, cache, jax.ShapeDtypeStruct((1, T), jnp.int32))
    assert "mosaic_gpu" in lowered.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "B, T, K, G, H, S, start, padding",
    [*SHAPES, (2, 1040, 2, 2, 128, 2000, [0, 777], 0), (1, 1024, 8, 2, 64, 4096, [3000], 100)],
)
def test_attention(B, T, K, G, H, S, start, padding, dtype):
    device = jax.devices()[0]
    if device.compute_capability != "9.0":
        pytest.skip("it needs a Hopper GPU")
    arguments, want = case(B, T, K, G, H, S, start, padding, dtype)
    got = module.attention(*map(jnp.asarray, arguments))
    assert got.dtype == dtype and jnp.isfinite(got.astype(jnp.float32)).all()
    assert relative(got[:, : T - padding], want[:, : T - padding]) < BOUND[dtype]

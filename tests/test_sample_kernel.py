"""The kernel that restricts logits to top-k and top-p, against sorted rows in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")

from jaxllm.kernels import reference, sample  # noqa: E402

RNG = np.random.default_rng(0)
BOTH = [(0, 1.0), (1, 1.0), (5, 1.0), (10**6, 1.0), (0, 0.5), (0, 0.97), (0, 1e-6), (7, 0.6), (60, 0.999), (3, 1e-6)]


def threshold(row, k, p):
    """The smallest logit that stays, by the definition."""
    ranks = np.sort(row.astype(np.float64))[::-1][: int(k) or None]
    likely = np.exp(ranks - ranks[0])
    likely /= likely.sum()
    before = np.cumsum(likely) - likely
    return ranks[before < p].min()


def check(logits, top_k, top_p, slack=1e-6):
    """restrict keeps, of each row of logits, what the definition keeps for some p that is no further from top_p."""
    top_k, top_p = (np.broadcast_to(a, len(logits)) for a in (top_k, top_p))
    settings = jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32)
    got = np.asarray(sample.restrict(jnp.asarray(logits), *settings))
    assert got.dtype == np.float32 and got.shape == logits.shape
    for row, out, k, p in zip(logits, got, top_k, top_p, strict=True):
        p = np.float64(np.float32(p)) if p < 1 else np.inf
        most, least = (row >= threshold(row, k, q) for q in (p + slack, max(p - slack, p / 2)))
        kept = out > -np.inf
        np.testing.assert_array_equal(out[kept], row[kept])
        assert not (kept & ~most).any() and not (least & ~kept & (row > -np.inf)).any(), (k, p, kept.sum())
        assert row[kept].min() > row[~kept & (row > -np.inf)].max(initial=-np.inf)  # ties stay or go together


def normal(*shape):
    return (RNG.normal(size=shape) * 3).astype(np.float32)


@pytest.fixture(params=["held", "streamed"])
def way(request, monkeypatch):
    """Both ways to go through a row, at a size that is quick to interpret."""
    if request.param == "streamed":
        monkeypatch.setattr(sample, "HELD", 0)
        monkeypatch.setattr(sample, "PIECE", 64)


@pytest.mark.parametrize("size", [1, 257])
def test_rows_with_settings_of_their_own(size, way):
    top_k, top_p = np.array(BOTH).T
    check(normal(len(BOTH), size), top_k, top_p)


def test_random_settings(way):
    check(normal(8, 130), RNG.integers(0, 140, 8), RNG.uniform(0.01, 1.05, 8))


@pytest.mark.parametrize(
    "row",
    [
        np.zeros(70),
        np.full(70, -7.5),
        RNG.integers(-2, 3, 70),  # many ties
        np.where(np.arange(70) % 2, 0.0, -0.0),
        np.append(np.where(np.arange(69) % 2, 0.0, -0.0), 1.0),
        np.append(np.full(68, -1.0), [0.0, -0.5]),  # ties that weigh much more than the k that belong to them
        np.where(np.arange(70) % 3, -np.inf, np.arange(70) / 10),
        np.where(np.arange(70) == 33, 2.0, -np.inf),
        np.append(np.arange(69), 1000.0),
        np.append(np.arange(69) / 9, -3e38),  # no use of the middle between the extremes
        np.append(np.arange(69) * 2e-38, 1e-36),  # around the smallest that is normal
        np.append(np.arange(69) * 1e-30, -1e30),
        np.concatenate([[3.4028235e38, -3.4028235e38], np.arange(68)]),
        1 + np.arange(70) * 1.2e-7,  # neighbours
        -1e4 - np.arange(70) * 0.01,
    ],
)
def test_extreme_rows(row):
    row = np.asarray(row, np.float32)
    top_k, top_p = np.array([(1, 1.0), (7, 1.0), (0, 0.5), (0, 0.97), (4, 0.6), (60, 0.999)]).T
    check(np.tile(row, (6, 1)), top_k, top_p)


def test_a_row_of_nothing_stays(way):
    empty = np.full((2, 70), -np.inf, np.float32)
    got = sample.restrict(jnp.asarray(empty), jnp.array([0, 3]), jnp.array([1.0, 0.5]))
    np.testing.assert_array_equal(got, empty)


@pytest.mark.parametrize("size", [sample.HELD, sample.HELD + 1])
def test_long_rows(size):
    check(normal(2, size), [50, 0], [0.9, 0.95], slack=1e-5)  # the interpreter sums one by one


def test_the_specification_agrees():
    top_k, top_p = np.array(BOTH).T
    logits = normal(len(BOTH), 90)
    arguments = logits, top_k.astype(np.int32), top_p.astype(np.float32)
    want, got = (jax.jit(restrict)(*arguments) for restrict in (reference.restrict, sample.restrict))
    np.testing.assert_array_equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32000, 128256, 262144])
@pytest.mark.parametrize("batch", [1, 9])
def test_real_shapes(size, batch):
    for scale in (0.1, 1, 4):
        check(scale * normal(batch, size), RNG.integers(0, 2000, batch), RNG.uniform(0.5, 1.02, batch))
    check(np.round(4 * normal(batch, size)) / 4, RNG.integers(0, 2000, batch), RNG.uniform(0.5, 1.02, batch))

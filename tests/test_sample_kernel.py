"""The kernel that restricts logits to top-k and top-p, against sorted rows in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")

from jaxllm.kernels import reference, sample  # noqa: E402

RNG = np.random.default_rng(0)
BOTH = [
    (0, 1.0), (1, 1.0), (5, 1.0), (10**6, 1.0), (0, 0.5), (0, 0.97), (0, 1e-6), (7, 0.6), (60, 0.999), (3, 1e-6),
    (150, 1.0), (200, 0.99), (64, 1.0), (65, 0.9),
]  # fmt: skip


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


@pytest.fixture(params=["pieces", "one piece"])
def pieces(request, monkeypatch):
    """Rows in several pieces, at a size that is quick to interpret, and in one."""
    if request.param == "pieces":
        monkeypatch.setattr(sample, "_piece", lambda width: 128)


@pytest.mark.parametrize("size", [1, 257])
def test_rows_with_settings_of_their_own(size, pieces):
    top_k, top_p = np.array(BOTH).T
    check(normal(len(BOTH), size), top_k, top_p)


def test_random_settings(pieces):
    check(normal(4, 300), RNG.integers(0, 140, 4), RNG.uniform(0.01, 1.05, 4))
    check(normal(3, 300) / 3, RNG.integers(0, 300, 3), RNG.uniform(0.9, 1.01, 3))


def test_a_part_that_has_all_of_the_largest():
    """A column of all pieces: what is the largest elsewhere says little."""
    width = 5 * sample._piece(10000)
    rows = normal(3, width)
    rows[:, :: width // 5] += 20
    check(rows, [4, 9, 0], 0.5)


def test_rows_of_few(pieces):
    """Less logits that are not -inf than k, more than k but in fewer parts of the row, and more than a piece."""
    rows = np.tile(normal(350), (6, 1))
    for row, step in zip(rows, [150, 40, 128, 2, 2, 2], strict=True):
        row[np.arange(350) % step > 0] = -np.inf
    check(rows, [40, 20, 2, 130, 0, 170], [0.6, 0.8, 0.9, 1.0, 0.99, 0.99])


@pytest.mark.parametrize(
    "row",
    [
        np.zeros(150),
        np.full(150, -7.5),
        RNG.integers(-2, 3, 150),  # many ties
        np.where(np.arange(150) % 2, 0.0, -0.0),
        np.append(np.where(np.arange(149) % 2, 0.0, -0.0), 1.0),
        np.append(np.full(148, -1.0), [0.0, -0.5]),  # ties that weigh much more than the k that belong to them
        np.where(np.arange(150) % 3, -np.inf, np.arange(150) / 10),
        np.where(np.arange(150) == 33, 2.0, -np.inf),
        np.append(np.arange(149), 1000.0),
        np.append(np.arange(149) / 9, -3e38),  # no use of the middle between the extremes
        np.append(np.arange(149) * 2e-38, 1e-36),  # around the smallest that is normal
        np.append(np.arange(149) * 1e-30, -1e30),
        np.concatenate([[3.4028235e38, -3.4028235e38], np.arange(148)]),
        1 + np.arange(150) * 1.2e-7,  # neighbours
        -1e4 - np.arange(150) * 0.01,
    ],
)
def test_extreme_rows(row, monkeypatch):
    monkeypatch.setattr(sample, "_piece", lambda width: 128)
    row = np.asarray(row, np.float32)
    top_k, top_p = np.array([(1, 1.0), (7, 1.0), (0, 0.5), (0, 0.97), (4, 0.6), (100, 0.999)]).T
    check(np.tile(row, (6, 1)), top_k, top_p)


def test_a_row_of_nothing_stays(pieces):
    empty = np.full((2, 70), -np.inf, np.float32)
    got = sample.restrict(jnp.asarray(empty), jnp.array([0, 3]), jnp.array([1.0, 0.5]))
    np.testing.assert_array_equal(got, empty)


@pytest.mark.parametrize("size", [32000, 33333])
def test_long_rows(size):
    check(normal(3, size), [50, 0, 0], [0.9, 0.95, 0.5], slack=1e-5)  # the interpreter sums one by one


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
        check(scale * normal(batch, size), RNG.integers(1, 100, batch), 0.95)
        check(scale * normal(batch, size), 0, RNG.uniform(0.5, 0.99, batch), slack=1e-5)
    check(np.round(4 * normal(batch, size)) / 4, RNG.integers(0, 2000, batch), RNG.uniform(0.5, 1.02, batch))

"""Drawn tokens against distributions worked out in float64, one row at a time."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.sampling import Sampling, sample

V = 12
DRAWS = 20000
LOGITS = np.array([2.0, -1.0, 0.3, 3.1, 0.0, 2.4, -3.0, 1.1, 1.7, -0.4, 2.9, 0.9], np.float32)
run = jax.jit(sample)


def draw(logits, sampling, rows=DRAWS, seen=None, step=0):
    """A token for each of many rows that differ in nothing but their seed."""
    settings = replace(sampling, seed=np.arange(rows)).rows(rows)
    seen = np.zeros(V, bool) if seen is None else seen
    tile = lambda a: np.tile(a, (rows, 1))  # noqa: E731
    return np.asarray(run(tile(logits), settings, np.full(rows, step, np.int32), tile(seen)))


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seen=()):
    """The probability of each token, by the definitions: sort, cut, renormalize."""
    x = logits.astype(np.float64)
    for token in seen:
        x[token] = x[token] / repetition_penalty if x[token] > 0 else x[token] * repetition_penalty
    p = np.exp(x / temperature)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    total = 0.0
    for token in order:
        if total >= top_p:
            p[token] = 0
        total += p[token]
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=2.5),
        dict(top_k=1),
        dict(top_k=4),
        dict(top_k=V + 5),
        dict(top_p=0.5),
        dict(top_p=0.9, temperature=1.7),
        dict(top_p=1e-6),
        dict(min_p=0.2),
        dict(min_p=1.0),
        dict(top_k=6, top_p=0.8, min_p=0.15, temperature=1.4),
        dict(repetition_penalty=1.8, seen=(3, 6, 10)),
        dict(repetition_penalty=0.6, seen=(1, 8)),
    ],
    ids=str,
)
def test_frequencies(settings):
    want = distribution(LOGITS, **settings)
    seen = np.isin(np.arange(V), settings.pop("seen", ()))
    tokens = draw(LOGITS, Sampling(**({"temperature": 1.0} | settings)), seen=seen)
    got = np.bincount(tokens, minlength=V) / DRAWS
    assert (got[want == 0] == 0).all()
    error = np.abs(got - want)
    assert (error <= 5 * np.sqrt(want * (1 - want) / DRAWS)).all(), error


def test_greedy_takes_the_most_likely_token_after_the_penalty():
    assert set(draw(LOGITS, Sampling(temperature=0.0), rows=8)) == {3}
    seen = np.arange(V) == 3
    assert set(draw(LOGITS, Sampling(temperature=0.0, repetition_penalty=2.0), rows=8, seen=seen)) == {10}
    assert set(draw(LOGITS, Sampling(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5), rows=8)) == {3}


def test_each_row_has_its_own_settings():
    settings = Sampling(temperature=np.array([0.0, 1.0, 1.0, 5.0]), top_k=np.array([0, 1, 2, 0]), seed=7)
    seen = np.zeros((4, V), bool)
    tokens = np.stack([run(np.tile(LOGITS, (4, 1)), settings.rows(4), np.full(4, n), seen) for n in range(200)])
    assert set(tokens[:, 0]) == set(tokens[:, 1]) == {3}
    assert set(tokens[:, 2]) == {3, 10}
    assert len(set(tokens[:, 3])) == V


def test_a_draw_depends_on_seed_and_step_alone():
    seen = np.zeros((1, V), bool)
    alone = np.array([run(LOGITS[None], Sampling(seed=s).rows(1), np.array([9]), seen)[0] for s in range(20)])
    np.testing.assert_array_equal(draw(LOGITS, Sampling(), rows=20, step=9), alone)
    assert (draw(LOGITS, Sampling(), rows=200, step=10) != draw(LOGITS, Sampling(), rows=200, step=9)).any()


def test_ties_and_infinite_logits():
    ties = np.where(np.arange(V) < 3, 1.0, -np.inf).astype(np.float32)
    assert set(draw(ties, Sampling(), rows=300)) == {0, 1, 2}
    assert set(draw(ties, Sampling(top_k=1), rows=300)) == {0, 1, 2}  # as likely as the one kept
    assert set(draw(ties, Sampling(top_p=0.99, min_p=0.5), rows=300)) == {0, 1, 2}


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_k=1.5),
        dict(top_k=2**31),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(min_p=-0.1),
        dict(repetition_penalty=0.0),
        dict(repetition_penalty=1e39),
        dict(temperature=2e-38),
        dict(top_p=1e-50),
        dict(seed=-1),
        dict(seed=2**32),
        dict(temperature="hot"),
        dict(top_p=[0.5, 0.5, 0.5]),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))) as caught:
        Sampling(**settings).rows(2)
    assert "\n" not in str(caught.value)

"""The next token: filters as transformers has them, and draws with the right frequencies."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rmlora_jax.errors import UserError
from rmlora_jax.inference.sampling import (
    Sampling,
    check_sampling,
    filtered,
    next_tokens,
    row_keys,
)

STORED = json.loads((Path(__file__).parents[1] / "fixtures" / "sampling.json").read_text())
TRACED = []


@jax.jit
def filter_jit(logits, sampling):
    TRACED.append(logits.shape)
    return filtered(logits, sampling)


tokens_jit = jax.jit(next_tokens)


def by_formula(row, temperature, top_k, top_p):
    """One row in numpy, float64."""
    row = np.float64(row) / temperature
    if top_k:
        row = np.where(row < np.sort(row)[-min(top_k, len(row))], -np.inf, row)
    if top_p < 1:
        order = np.argsort(row, kind="stable")
        p = np.exp(row - row.max())
        out = np.cumsum((p / p.sum())[order]) <= 1 - top_p
        out[-1] = False
        row[order[out]] = -np.inf
    return row


@pytest.mark.parametrize("case", STORED["of"], ids=lambda case: str(case["sampling"]))
def test_the_filters_are_those_of_transformers(case):
    logits = np.float32(STORED["logits"])
    expected = np.array([[-np.inf if v is None else v for v in row] for row in case["logits"]])
    found = np.asarray(filter_jit(logits, Sampling(*case["sampling"])))
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-6)
    # All equal: how many stay is the same, which of them do is up to the sort.
    np.testing.assert_array_equal(np.isfinite(found).sum(1), np.isfinite(expected).sum(1))
    for row, logit in zip(found, logits, strict=True):
        np.testing.assert_allclose(row, by_formula(logit, *case["sampling"]), rtol=1e-6)


def test_a_large_vocabulary_and_many_settings():
    rng = np.random.RandomState(1)
    logits = rng.normal(0, 3, (3, 5000)).astype(np.float32)
    for _ in range(8):
        given = float(rng.uniform(0.3, 2)), int(rng.randint(0, 200)), float(rng.uniform(0.5, 0.99))
        found = np.isfinite(filter_jit(logits, Sampling(*given)))
        expected = np.isfinite([by_formula(row, *given) for row in logits])
        # Cumulative sums in float32 may differ about one token at the border.
        assert (found != expected).sum(1).max() <= 1
        assert found[np.arange(3), logits.argmax(1)].all()
    assert TRACED.count(logits.shape) == 1  # other values compile nothing


def test_greedy_takes_the_first_of_the_largest():
    logits = jnp.array([[0.0, 3.0, 3.0], [2.0, 1.0, -1.0]])
    found = tokens_jit(logits, row_keys(0, jnp.arange(2)), jnp.arange(2), Sampling(0.0, 1, 0.5))
    assert found.dtype == jnp.int32 and found.tolist() == [1, 0]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.5, 4), Sampling(1.5, 0, 0.8)])
def test_frequencies(sampling):
    """Chi-squared of 20,000 draws against the probabilities; a right sampler fails once in 1e4."""
    logits, n = np.float32(np.random.RandomState(2).normal(0, 1.5, 9)), 20000
    keys = row_keys(3, jnp.arange(n))
    found = tokens_jit(jnp.broadcast_to(logits, (n, 9)), keys, jnp.full(n, 5), sampling)
    weights = np.exp(by_formula(logits, *sampling))
    counts, kept = np.bincount(found, minlength=9), weights > 0
    assert not counts[~kept].any()
    assert stats.chisquare(counts[kept], n * weights[kept] / weights.sum()).pvalue > 1e-4
    # Along the positions of one row, too.
    one = jnp.broadcast_to(row_keys(4, jnp.arange(1)), n)
    found = tokens_jit(jnp.broadcast_to(logits, (n, 9)), one, jnp.arange(n), sampling)
    counts = np.bincount(found, minlength=9)[kept]
    assert stats.chisquare(counts, n * weights[kept] / weights.sum()).pvalue > 1e-4


def test_a_draw_depends_on_its_own_row_alone():
    logits = jnp.asarray(np.random.RandomState(5).normal(0, 1, (6, 50)), jnp.float32)
    places = jnp.array([3, 9, 1, 0, 7, 2])
    every = tokens_jit(logits, row_keys(7, jnp.arange(6)), places, Sampling(1.0))
    some = jnp.array([4, 1])
    found = tokens_jit(logits[some], row_keys(7, some), places[some], Sampling(1.0))
    assert found.tolist() == every[some].tolist()
    others = [tokens_jit(logits, row_keys(seed, jnp.arange(6)), places + shift, Sampling(1.0))
              for seed, shift in ((8, 0), (7, 1))]
    assert all((other != every).any() for other in others)


@pytest.mark.parametrize(("values", "words"), [
    ((-0.1, 0, 1.0), "temperature is -0.1; it must be 0"),
    ((1e-9, 0, 1.0), "temperature is 1e-09"),
    ((float("nan"), 0, 1.0), "temperature is nan"),
    ((1.0, -1, 1.0), "top_k is -1; it must be a whole number"),
    ((1.0, 2.5, 1.0), "top_k is 2.5"),
    ((1.0, 0, 0.0), "top_p is 0.0; it must be above 0"),
    ((1.0, 0, 1.1), "top_p is 1.1"),
])
def test_values_that_are_refused(values, words):
    with pytest.raises(UserError) as error:
        check_sampling(Sampling(*values))
    assert str(error.value).startswith(words)

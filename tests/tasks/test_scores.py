"""Metrics against their formulas, written out in numpy."""

import doctest
import math

import numpy as np
import pytest

from rmlora_jax.errors import UserError
from rmlora_jax.tasks import scores
from rmlora_jax.tasks.scores import NAMES, describe, higher_is_better, score, shown


def classes(n=400, count=2, right=0.6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(count, n, p=np.arange(1, count + 1) / sum(range(1, count + 1)))
    predictions = np.where(rng.random(n) < right, labels, rng.integers(count, size=n))
    return predictions.astype(np.int32), labels.astype(np.int32)


def values(n=400, seed=0):
    """Labels of tenths, as those of STS-B, so that many tie; predictions of float32."""
    rng = np.random.default_rng(seed)
    labels = np.round(rng.uniform(0, 5, n) * 5) / 5
    predictions = np.round(0.7 * labels + rng.normal(0, 0.8, n), 1)
    return predictions.astype(np.float32), labels.astype(np.float32)


def confusion(predictions, labels):
    """counts[i, j]: how often label i was answered by j."""
    count = 1 + max(predictions.max(), labels.max())
    table = np.zeros((count, count))
    np.add.at(table, (labels, predictions), 1)
    return table


def f1_of(table, c):
    hits = table[c, c]
    return 2 * hits / (table[c].sum() + table[:, c].sum())


def ranks(x):
    """1 for the smallest; those that tie share their mean."""
    return np.array([(np.sum(x < v) + 1 + np.sum(x <= v)) / 2 for v in x])


def correlation(a, b):
    a, b = a.astype(np.float64) - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())


def test_examples_in_docstrings():
    result = doctest.testmod(scores)
    assert result.attempted >= 4 and result.failed == 0


@pytest.mark.parametrize("seed", range(3))
def test_two_classes(seed):
    predictions, labels = classes(seed=seed)
    (tn, fp), (fn, tp) = confusion(predictions, labels)
    found = score(predictions, labels, ("accuracy", "matthews", "f1", "f1_macro"))
    assert list(found) == ["accuracy", "matthews", "f1", "f1_macro"]
    assert all(type(value) is float for value in found.values())
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    one, zero = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fp + fn)
    assert found == pytest.approx(
        {"accuracy": (tp + tn) / 400, "matthews": matthews, "f1": one,
         "f1_macro": (one + zero) / 2}, rel=1e-12)
    assert 0.2 < found["matthews"] < 0.8, "the comparison says something"


@pytest.mark.parametrize("count", [3, 5])
def test_several_classes(count):
    predictions, labels = classes(count=count)
    table = confusion(predictions, labels)
    n, hits = table.sum(), np.trace(table)
    of_label, of_answer = table.sum(1), table.sum(0)
    # The multi-class form of Gorodkin (2004).
    matthews = (hits * n - of_label @ of_answer) / math.sqrt(
        (n**2 - of_answer @ of_answer) * (n**2 - of_label @ of_label))
    macro = np.mean([f1_of(table, c) for c in range(count)])
    found = score(predictions, labels, ("matthews", "f1_macro", "accuracy"))
    expected = {"matthews": matthews, "f1_macro": macro, "accuracy": hits / n}
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_values(seed):
    predictions, labels = values(seed=seed)
    assert len(np.unique(labels)) < 30 and len(np.unique(predictions)) < 100, "ties"
    found = score(predictions, labels, ("pearson", "spearman", "mse"))
    exact = predictions.astype(np.float64), labels.astype(np.float64)
    assert found == pytest.approx(
        {"pearson": correlation(*exact), "spearman": correlation(ranks(labels), ranks(predictions)),
         "mse": np.mean((exact[0] - exact[1]) ** 2)}, rel=1e-9)


def test_a_large_offset_costs_no_precision():
    """float32 holds 4096 + x for x of eighths exactly; sums of its squares need float64."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 40, (2, 50_000)) / 8
    plain = score(x, x + y, ("pearson", "mse"))
    moved = score(*(np.float32(4096 + v) for v in (x, x + y)), ("pearson", "mse"))
    assert moved == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
@pytest.mark.filterwarnings("error")
def test_a_correlation_with_a_constant_is_zero(name):
    vary = np.array([0, 1, 1, 0])
    for constant in (np.zeros(4, int), np.ones(4, int)):
        assert score(constant, vary, (name,)) == score(vary, constant, (name,)) == {name: 0.0}


@pytest.mark.filterwarnings("error")
def test_f1_without_a_hit_is_zero():
    none, some = np.zeros(4, int), np.array([0, 1, 0, 1])
    assert score(none, some, ("f1",)) == {"f1": 0.0}
    assert score(none, none, ("f1",)) == {"f1": 0.0}
    assert score(none, some, ("f1_macro",)) == {"f1_macro": pytest.approx((2 * 2 / 6 + 0) / 2)}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_have_no_score(bad):
    found = score(np.float32([1, bad, 3]), np.float32([1, 2, 3]), ("pearson", "spearman", "mse"))
    assert all(math.isnan(value) for value in found.values())


def test_errors_say_what_to_use():
    with pytest.raises(UserError, match="a class 2; use f1_macro"):
        score(np.array([0, 2]), np.array([0, 1]), ("f1",))
    for predictions, labels in ((np.ones(3), np.ones(2)), (np.ones(0), np.ones(0)),
                                (np.ones((2, 2)), np.ones((2, 2)))):
        with pytest.raises(ValueError, match=r"must both be \(n,\), n > 0"):
            score(predictions, labels, ("accuracy",))


def test_names():
    classes = ("accuracy", "matthews", "f1", "f1_macro", "f1_micro")
    assert (*classes, "pearson", "spearman", "mse") == NAMES
    assert scores.names_of(classes=True) == classes
    worse = {name for name in (*NAMES, "loss") if not higher_is_better(name)}
    assert worse == {"mse", "loss"}
    assert describe("f1_macro") == (scores.METRICS["f1_macro"], "")
    assert describe("f1_mismatched") == (scores.METRICS["f1"], "mismatched")
    assert describe("steps") == (scores.Metric(None, "steps", "steps", "steps"), "")
    assert [shown(key, 0.5) for key in ("accuracy_mismatched", "pearson", "f1")] == [
        "50.0 %", "0.500", "0.500"]
    assert shown("matthews", -0.04567) == "-0.046"


def test_f1_of_either_class_and_over_all_decisions():
    predictions, labels = classes()
    table = confusion(predictions, labels)
    for positive in (0, 1):
        found = score(predictions, labels, ("f1",), positive)
        assert found == pytest.approx({"f1": f1_of(table, positive)}, rel=1e-12)
    predictions, labels = classes(count=4)
    table = confusion(predictions, labels)
    hits, wrong = np.trace(table), table.sum() - np.trace(table)
    micro = 2 * hits / (2 * hits + wrong + wrong)  # each wrong one is missed and falsely found
    assert score(predictions, labels, ("f1_micro",)) == pytest.approx({"f1_micro": micro})


def test_a_split_with_an_unanswered_example_has_no_score():
    found = score(np.array([0, -1, 1]), np.array([0, 1, 1]), ("accuracy", "f1"))
    assert np.isnan(list(found.values())).all()

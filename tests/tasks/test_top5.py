"""Accuracy among the five most probable classes, against scikit-learn."""

import doctest

import jax.numpy as jnp
import numpy as np
import pytest
from faults.small import column, config_of, on_one_device, train
from sklearn.metrics import top_k_accuracy_score

from rmlora_jax.report.run import other_figures
from rmlora_jax.tasks import top5
from rmlora_jax.tasks.scores import shown
from rmlora_jax.tasks.task import Outputs, classification, measured

LOGITS = np.random.default_rng(0).standard_normal((400, 12)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(12, size=400).astype(np.int32)


def rows_of(logits, labels):
    found = classification().predict(lambda: jnp.asarray(logits), jnp.asarray(labels))
    return {name: np.asarray(value) for name, value in found.items()}


def figures(logits, labels):
    rows = rows_of(logits, labels)
    rows, own = {k: rows.pop(k) for k in ("label", "prediction", "loss")}, rows
    ids = np.arange(len(labels))
    return measured(Outputs(ids, rows["prediction"], rows["label"], rows["loss"], sums=own),
                    ("accuracy",))


def test_the_example_of_the_docstring():
    result = doctest.testmod(top5)
    assert result.attempted == 1 and result.failed == 0


def test_it_is_that_of_scikit_learn():
    found = figures(LOGITS, LABELS)
    expected = top_k_accuracy_score(LABELS, LOGITS, k=5, labels=range(12))
    assert 0.3 < expected < 0.5
    assert found["accuracy_top5"] == pytest.approx(expected, abs=1e-12)
    assert list(found) == ["accuracy", "accuracy_top5", "loss"]
    one = top_k_accuracy_score(LABELS, LOGITS, k=1, labels=range(12))
    assert found["accuracy"] == pytest.approx(one, abs=1e-12)


def test_a_run_measures_it(tiny_vit, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    monkeypatch.setattr(top5, "MANY", 5)  # the digits are ten
    config = config_of(tiny_vit)
    config.steps = config.eval_every = 2
    summary = train(config, tmp_path)
    (validation,) = column(tmp_path, "validation/accuracy_top5")
    for value in (validation, summary["test"]["accuracy_top5"]):
        assert 0.2 < value < 0.9  # by chance a half, beside an accuracy of a tenth
    assert summary["test"]["accuracy"] < summary["test"]["accuracy_top5"]
    assert summary["metric"] == "accuracy"


def test_of_ten_classes_there_is_none():
    assert "accuracy_top5" not in rows_of(LOGITS[:, :10], LABELS % 10)


def test_logits_that_are_not_finite_have_none():
    logits = LOGITS.copy()
    logits[3, 2] = np.nan
    found = figures(logits, LABELS)
    assert np.isnan(found["accuracy_top5"]) and np.isnan(found["accuracy"])


def test_reports_name_it():
    assert shown("accuracy_top5", 0.84) == "84.0 %"
    assert other_figures({"accuracy": 0.5, "accuracy_top5": 0.84}, "accuracy") == [
        ("top5", "84.0 % accuracy")]

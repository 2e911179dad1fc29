"""Which classes were taken for which, against scikit-learn."""

import doctest

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from rmlora_jax.tasks.task import Outputs
from rmlora_jax.train import finished


def test_examples():
    result = doctest.testmod(finished)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("classes", [2, 20, 21, 300])
def test_confusions_equal_those_of_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    labels, taken = rng.integers(0, classes, (2, 2000)).astype(np.int32)
    found = finished.confusion(Outputs(labels, taken, labels, labels), None)
    whole = confusion_matrix(labels, taken, labels=range(classes))
    assert found.get("matrix") == (whole.tolist() if classes <= 20 else None)
    wrong = whole * (1 - np.eye(classes, dtype=int))
    expected = sorted(wrong.ravel().tolist(), reverse=True)[:20]
    assert [count for _, _, count, _ in found["pairs"]] == [n for n in expected if n]
    for true, took, count, of in found["pairs"]:
        assert wrong[int(true), int(took)] == count and whole[int(true)].sum() == of


def test_values_have_no_classes_and_unknown_classes_their_number():
    values = np.array([0.5, 1.0])
    assert finished.confusion(Outputs(values, values, values, values), None) == {}
    labels = np.array([0, 1])
    found = finished.confusion(Outputs(labels, labels + 1, labels, labels), ("cat", "dog"))
    assert found["names"] == ["cat", "dog", "2"]
    assert found["pairs"] == [["cat", "dog", 1, 1], ["dog", "2", 1, 1]]

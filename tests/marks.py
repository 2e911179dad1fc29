"""Which values of a parameter wait for the slow run."""

import pytest


def slow_but(values, *quick):
    """``values``, of which only those that are ``quick`` run without ``-m slow``."""
    assert all(value in values for value in quick)
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


def slow(*value):
    return pytest.param(*value, marks=pytest.mark.slow)

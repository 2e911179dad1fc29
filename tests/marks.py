"""Which values of a parameter wait for the slow run."""

import pytest


def slow(*value):
    """The values of a case that waits for the slow run."""
    return pytest.param(*value, marks=pytest.mark.slow)


def slow_but(values, *quick):
    """``values``, of which only those that are ``quick`` run without ``-m slow``."""
    assert all(value in values for value in quick)
    return [value if value in quick else slow(value) for value in values]


def every_other(values):
    """``values``, of which the first, the third and so on run without ``-m slow``."""
    return slow_but(list(values), *list(values)[::2])

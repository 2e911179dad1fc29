"""The text of ``sweep.grid``, read: a list of settings, and what a run of one is called."""

import ast
import itertools
import math
from collections.abc import Mapping

MOST_RUNS = 10_000  # of a sweep
EXAMPLE = "{'penalty': (0, 0.1), 'keep': (0.5, 1)}"


def parse(text: str) -> list[dict[str, float]]:
    """The settings of a grid, in order; ``[{}]`` of an empty text.

    A dict of names and values means every combination, the last name fastest; a list of dicts means
    just these.

    >>> parse("{'penalty': (0, .1), 'keep': .5}")
    [{'penalty': 0.0, 'keep': 0.5}, {'penalty': 0.1, 'keep': 0.5}]
    >>> parse("[{'alpha': 8}, {'alpha': 16, 'penalty': 0}]")
    [{'alpha': 8.0}, {'alpha': 16.0, 'penalty': 0.0}]

    Raises:
      ValueError: it is neither of the two, or a value is no number.
    """
    if not text.strip():
        return [{}]
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"not a Python literal; write it like \"{EXAMPLE}\"") from None
    if isinstance(value, dict):
        columns = {k: v if isinstance(v, list | tuple) else (v,) for k, v in value.items()}
        if math.prod(map(len, columns.values())) > MOST_RUNS:
            raise ValueError(f"more than {MOST_RUNS:,} combinations")
        settings = [
            dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())
        ]
    elif isinstance(value, list | tuple) and all(isinstance(entry, dict) for entry in value):
        settings = list(value)
    else:
        settings = []
    if not settings or not all(settings):
        raise ValueError(
            f"must be a dict of names and their values, or a list of dicts; like \"{EXAMPLE}\""
        )
    return [{name: _number(name, v) for name, v in setting.items()} for setting in settings]


def _number(name, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name!r} has the value {value!r}, which is not a finite number")
    return float(value)


def name(values: Mapping[str, float]) -> str:
    """What a run with these values is called, also on disk.

    >>> name({"seed": 3, "penalty": 0.1, "keep": 1.0})
    'seed=3,penalty=0.1,keep=1'
    """
    return ",".join(f"{key}={number(value)}" for key, value in values.items())


def number(value: float) -> str:
    """The shortest decimal that reads back as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)

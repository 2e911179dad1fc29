"""Whether the fields of a config are there and of their kinds, before their values are looked at.

A ConfigDict refuses most values of another kind itself, but not True for 1, NaN, what stands in a
tuple, or what is set while types are ignored.
"""

import math
from collections.abc import Iterable
from typing import Any

import ml_collections
import numpy as np

from rmlora_jax.errors import did_you_mean
from rmlora_jax.train.config import flatten

WORDS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Whether a value is a finite number; True and False are none.

    >>> is_number(1), is_number(0.5), is_number(True), is_number(math.nan), is_number("1")
    (True, True, False, False, False)
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return abs(int(value)) < 2**1000  # it can be a float
    return not whole and isinstance(value, float | np.floating) and math.isfinite(value)


def _pairs(value: tuple, whole: bool) -> bool:
    pairs = all(isinstance(one, tuple | list) and len(one) == 2 for one in value)
    return pairs and all(
        isinstance(name, str) and is_number(number, whole=whole) and number > 0
        for name, number in value
    )


def is_names(value: Any) -> bool:
    """Whether it is a tuple of words."""
    return isinstance(value, tuple | list) and all(isinstance(one, str) and one for one in value)


# What stands in a tuple, where it is not names.
ELEMENTS = {
    "speech.speakers": ("whole numbers", lambda v: all(is_number(x, whole=True) for x in v)),
    "lora.rank_pattern": ("pairs (regex, rank), with ranks above 0", lambda v: _pairs(v, True)),
    "lora.alpha_pattern": ("pairs (regex, alpha), with numbers above 0",
                           lambda v: _pairs(v, False)),
    # Of studies.
    **dict.fromkeys(("rates", "full_rates", "head_rates"),
                    ("numbers", lambda v: all(map(is_number, v)))),
    "variants": ("tuples of fields, such as (('lora.rank=2',), ())",
                 lambda v: all(map(is_names, v))),
}


def mistakes_of_kind(
    c: ml_collections.ConfigDict, default: ml_collections.ConfigDict
) -> dict[str, str]:
    """The fields that are missing, unknown, or hold a value of another kind than the default's,
    and what is wrong with each. A section that is empty by default may hold anything.

    >>> default = ml_collections.ConfigDict({"batch_size": 64, "data": {"limit": 0}})
    >>> c = ml_collections.ConfigDict({"batch_size": True, "data": {"limt": 0, "limit": 3}})
    >>> list(mistakes_of_kind(c, default).values())
    ['config.batch_size=True: must be a whole number',
     'config.data.limt: there is no such field; did you mean data.limit?']
    """
    known, own, wrong = flatten(default), flatten(c), {}
    for name in known:
        if name not in own:
            wrong[name] = f"config.{name} is missing; its default is {known[name]!r}"
        elif words := _mistake(name, own[name], default):
            wrong[name] = f"config.{name}={repr(own[name])[:80]}: must be {words}"
    for name, value in own.items():
        if name in known or _is_free(name.rpartition(".")[0], default):
            continue
        wrong[name] = (
            f"config.{name}={repr(value)[:80]}: must be a section with fields"
            if name in default
            else f"config.{name}: there is no such field{did_you_mean(name, known)}"
        )
    return dict(sorted(wrong.items()))


def _is_free(section: str, default: ml_collections.ConfigDict) -> bool:
    """Whether the default has a section of this name, without fields."""
    return bool(section) and hasattr(default.get(section), "items") and not default[section]


def _mistake(name: str, value: Any, default: ml_collections.ConfigDict) -> str | None:
    section, _, field = name.rpartition(".")
    node = default[section] if section else default
    kind, end = node.get_type(field), ", or None" if node[field] is None else ""
    if value is None and end:
        return None
    if kind is tuple:
        if not isinstance(value, tuple | list):
            return f"a tuple of {ELEMENTS[name][0] if name in ELEMENTS else 'names'}"
        words, fine = ELEMENTS.get(name, ("names", is_names))
        return None if fine(value) else words
    if kind in (int, float):
        fine = is_number(value, whole=kind is int)
    else:
        fine = isinstance(value, kind)
    return None if fine else WORDS[kind] + end


def with_defaults(
    c: ml_collections.ConfigDict, names: Iterable[str], default: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """A copy with these fields at their defaults, and without those that have none."""
    own = ml_collections.ConfigDict(default)
    with own.ignore_type(), own.unlocked():
        for name, value in flatten(c).items():
            if name in names:
                continue
            *sections, field = name.split(".")
            node = own
            for section in sections:
                node = node[section]
            node[field] = value
    return own

"""Damaged and hostile versions of a file, drawn from a numpy generator."""

import json
import re

import numpy as np

SIZES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**62,
         2**63 - 1, 2**63, 2**64 - 1]
PATHS = ["..", "../../../etc/passwd", "/etc/passwd", "a/../../b", "C:\\x", "", ".", "\0", "a" * 300]
PATTERNS = ["(a+)+$", "(.*)*x", "(" * 50, "[a-", "(?P<n>.)(?P=n)", ".*.*.*.*.*.*=", "\\"]
NUMBERS = [0, -1, 1, 2**15, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, -(2**63), 1e308, 5e-324,
           float("nan"), float("inf"), -0.0, 0.5]
VALUES = [None, True, False, [], {}, "x" * 100_000, "\ud800", "é\u202e", [0] * 10_000, [[]],
          {"": {}}]


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """``data`` after one to three changes; ``other`` is a file that parts are taken from."""
    is_json = data[:1] in (b"{", b"[")
    for _ in range(pick(rng, (1, 1, 1, 2, 3))):
        if is_json and rng.random() < 0.7:
            try:
                data = mutated_json(data, rng)
                continue
            except (ValueError, RecursionError):  # it is no JSON any more
                pass
        data = bytes(pick(rng, CHANGES)(bytearray(data), other, rng))
    return data


def pick(rng, things):
    return things[rng.integers(len(things))]


def span(size: int, rng) -> slice:
    start = int(rng.integers(size + 1))
    length = int(rng.integers(1, 5)) if rng.random() < 0.5 else int(rng.integers(size + 1))
    return slice(start, start + length)


def flip(data, other, rng):
    for at in rng.integers(0, max(len(data), 1), rng.integers(1, 9)):
        data[at : at + 1] = bytes([data[at] ^ 1 << rng.integers(8)]) if data else b""
    return data


def put(data, other, rng):
    for at in rng.integers(0, max(len(data), 1), rng.integers(1, 5)):
        data[at : at + 1] = bytes([pick(rng, (0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))))])
    return data


def cut(data, other, rng):
    return data[: rng.integers(len(data) + 1)]


def drop(data, other, rng):
    del data[span(len(data), rng)]
    return data


def repeat(data, other, rng):
    part = data[span(len(data), rng)]
    at = rng.integers(len(data) + 1)
    return data[:at] + part * int(rng.integers(1, 4)) + data[at:]


def splice(data, other, rng):
    at = rng.integers(len(data) + 1)
    return data[:at] + other[span(len(other), rng)] + data[at:]


def cross(data, other, rng):
    return data[: rng.integers(len(data) + 1)] + other[rng.integers(len(other) + 1) :]


def length_field(data, other, rng):
    """A number of 1 to 8 bytes becomes a very large or odd one; mostly near the start, where
    headers are."""
    width = int(pick(rng, (1, 2, 4, 8)))
    end = min(len(data), 256) if rng.random() < 0.5 else len(data)
    at = int(rng.integers(end + 1))
    number = pick(rng, SIZES) % 2 ** (8 * width)
    data[at : at + width] = number.to_bytes(width, pick(rng, ("little", "big")))
    return data


def decimal(data, other, rng):
    found = list(re.finditer(rb"\d+", data[:100_000]))
    if found:
        one = pick(rng, found)
        data[slice(*one.span())] = str(pick(rng, SIZES)).encode()
    return data


# The small ones oftener: what is damaged beyond recognition is refused at the first byte.
CHANGES = 3 * [flip, put, length_field, decimal] + [cut, drop, repeat, splice, cross]


def mutated_json(data: bytes, rng) -> bytes:
    """JSON with one value, name or depth changed, or a name there twice."""
    value = json.loads(data)
    places = list(nodes(value))
    if not places or rng.random() < 0.05:
        deep = int(pick(rng, (50, 1500, 100_000)))
        kind = pick(rng, (("[", "]"), ('{"a":', "}")))
        return (kind[0] * deep + "1" + kind[1] * deep).encode()
    parent, key = pick(rng, places)
    what = rng.integers(8)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[pick(rng, PATHS + PATTERNS)] = parent.pop(key)
    elif what == 2:
        there, name = pick(rng, places)
        if name in there if isinstance(there, dict) else name < len(there):
            parent[key] = json.loads(json.dumps(there[name]))  # a copy: no value in itself
    elif what == 3 and isinstance(parent, dict):
        text = json.dumps(value)
        first = f"{json.dumps(key)}: "
        return text.replace(first, f"{first}{json.dumps(pick(rng, NUMBERS))}, {first}", 1).encode()
    elif what == 4 and isinstance(parent[key], str):
        parent[key] = pick(rng, PATHS + PATTERNS)
    else:
        parent[key] = pick(rng, pick(rng, (NUMBERS, VALUES, PATHS)))
    return json.dumps(value).encode()


def nodes(value):
    """(container, key) of every value inside; of long containers the first and last alone."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    if len(keys) > 40:
        keys = [*keys[:20], *keys[-20:]]
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from nodes(value[key])

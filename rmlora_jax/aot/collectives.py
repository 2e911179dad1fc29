"""The collectives that a compiled program executes, from its optimized HLO text.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all",
         "collective-broadcast", "ragged-all-to-all")

# A line such as `%psum.3 = (f32[4]{0}, f32[]) all-reduce(%a, %b), channel_id=1, ...`.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .+ \{\s*$")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation|"
                     r"branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of ``KINDS``.
      bytes: of its result on one device, each time that it runs.
      times: how often it runs in one call of the program; None in a loop whose number of turns
        the compiler does not tell.
    """

    kind: str
    bytes: int
    times: int | None


def collectives(text: str) -> list[Collective]:
    """The collectives of ``compiled.as_text()``, in the order in which they are reached.

    A pair of start and done counts once; both branches of a condition count.

    Raises:
      ValueError: the text is not that of a compiled program.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("no ENTRY computation: give the text of compiled.as_text()")
    return list(_executed(computations, entry, 1))


def total_bytes(found: list[Collective]) -> int | None:
    """Bytes of all, each as often as it runs; None where that is not known of one."""
    if any(c.times is None for c in found):
        return None
    return sum(c.bytes * c.times for c in found)


class _Instruction(NamedTuple):
    shape: str
    op: str
    rest: str  # operands and attributes


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = computations.setdefault(begins[2], [])
            entry = begins[2] if begins[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_Instruction(*found.groups()[1:]))
    return computations, entry


def _executed(computations, name: str, times: int | None) -> Iterator[Collective]:
    for shape, op, rest in computations.get(name, ()):
        kind = op.removesuffix("-start")
        if kind in KINDS:
            yield Collective(kind, _bytes(shape, op), times)
            continue  # what it calls is the addition of two numbers
        inner = times
        if op == "while":
            turns = _TRIPS.search(rest)
            inner = None if times is None or turns is None else times * int(turns[1])
        for _, called in _CALLED.findall(rest):
            for one in re.findall(r"[\w.-]+", called):
                yield from _executed(computations, one, inner)


def _bytes(shape: str, op: str) -> int:
    """Size of a result; a start also gives its operands, and maybe tokens, which do not count."""
    if op.endswith("-start") and op != "all-reduce-start":
        shape = _parts(shape)[1]
    return sum(_size(*array) for array in _ARRAY.findall(shape))


def _parts(shape: str) -> list[str]:
    """The elements of a tuple's shape, tuples among them whole.

    >>> _parts("((f32[2]{0}, s8[]), f32[8]{0:T(8,128)})")
    ['(f32[2]{0}, s8[])', 'f32[8]{0:T(8,128)}']
    """
    parts, depth = [""], 0
    for char in shape[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _size(dtype: str, dims: str) -> int:
    """Bytes of an array, without the padding of a tiled layout.

    >>> _size("bf16", "3,4"), _size("pred", ""), _size("f8e4m3fn", "2"), _size("s4", "3")
    (24, 1, 2, 2)
    """
    bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d*).*", r"\1", dtype) or 0)
    count = 1
    for dim in filter(None, dims.split(",")):
        count *= int(dim.removeprefix("<="))
    return (bits * count + 7) // 8

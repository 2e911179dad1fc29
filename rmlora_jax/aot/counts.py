"""Collectives of a compiled step and flops of a traced one.

Both count the body of a loop once for each turn, where XLA's cost analysis counts it once. Flops
are those of matrix products and convolutions, those recomputed in the backward pass
(``model.remat``) included.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

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
    """One collective instruction."""

    kind: str  # one of KINDS
    bytes: int  # of its result on one device, each time it runs
    times: int | None  # per call of the program; None in a loop whose turns are unknown


def collectives(text: str) -> list[Collective]:
    """The collectives of ``compiled.as_text()``, in the order of the program.

    A pair of start and done counts once; both branches of a condition count.

    Raises:
      ValueError: the text is not that of a compiled program.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = computations.setdefault(begins[2], [])
            entry = begins[2] if begins[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(found.groups()[1:])  # shape, operation, operands and attributes
    if entry is None:
        raise ValueError("no ENTRY computation: give the text of compiled.as_text()")
    return list(_executed(computations, entry, 1))


def total_bytes(found: list[Collective]) -> int | None:
    """Bytes of all, each as often as it runs; None where a number of turns is unknown."""
    known = [c.bytes * c.times for c in found if c.times is not None]
    return sum(known) if len(known) == len(found) else None


def _executed(computations, name: str, times: int | None) -> Iterator[Collective]:
    for shape, op, rest in computations.get(name, ()):
        kind = op.removesuffix("-done")  # its shape is that of the result alone
        if kind in KINDS:
            yield Collective(kind, sum(_size(*array) for array in _ARRAY.findall(shape)), times)
        if kind.removesuffix("-start") in KINDS:
            continue  # what it calls is the addition of two numbers
        inner = times
        if op == "while":
            turns = _TRIPS.search(rest)
            inner = None if times is None or turns is None else times * int(turns[1])
        for _, called in _CALLED.findall(rest):
            for one in re.findall(r"[\w.-]+", called):
                yield from _executed(computations, one, inner)


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


def flops(traced: Any) -> int:
    """Operations of ``jax.jit(f).trace(*args)``; a multiplication and an addition are two.

    Inside `jax.shard_map` they are those of one device.

    >>> import jax.numpy as jnp
    >>> def product(a, b):
    ...     return jax.lax.scan(lambda c, _: (c @ b, None), a, None, length=5)[0]
    >>> flops(jax.jit(product).trace(jnp.ones((2, 3)), jnp.ones((3, 3))))
    180
    """
    return _count(traced.jaxpr.jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * eqn.outvars[0].aval.size
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * (kernel.size // outputs) * eqn.outvars[0].aval.size
        elif name == "cond":
            total += max(map(_count, inner_programs(eqn.params["branches"])))
        elif name == "custom_jvp_call" or name == "custom_vjp_call":
            # The function itself, not its rules.
            total += max(map(_count, inner_programs(eqn.params)), default=0)
        else:
            turns = eqn.params["length"] if name == "scan" else 1
            total += turns * sum(map(_count, inner_programs(eqn.params)))
    return total


def inner_programs(params: Any) -> Iterator[Any]:
    """The programs among the parameters of an equation."""
    for leaf in jax.tree.leaves(params):
        program = getattr(leaf, "jaxpr", leaf)
        if hasattr(program, "eqns"):
            yield program

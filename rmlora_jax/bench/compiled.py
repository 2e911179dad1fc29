"""A variant compiled ahead of time, and the stretches of steps by which it is timed."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from rmlora_jax.bench.execution import execution_of
from rmlora_jax.bench.variants import Variant


class Program(NamedTuple):
    """Something that takes steps, of JAX or of another framework.

    Attributes:
      name: of its row.
      stretch: a number of steps -> the seconds they took.
      facts: what else is known of it, for ``bench.json``.
    """

    name: str
    stretch: Callable[[int], float]
    facts: dict[str, Any]


def compile_variant(variant: Variant, base: dict, batches: Sequence[tuple]) -> Program:
    """Compiles the step for these shapes.

    Each stretch begins with a new state and a step that is not timed, so that the states of several
    variants are never on the device together. It goes through ``batches`` in a circle, and ends
    when the last state and output are there.
    """
    start, frozen = jax.jit(variant.start), variant.frozen(base)
    state = jax.eval_shape(start, base, batches[0][0])
    began = time.perf_counter()
    traced = jax.jit(variant.step, donate_argnums=0).trace(state, frozen, batches[0])
    program = traced.lower().compile()
    seconds = time.perf_counter() - began

    def stretch(steps: int) -> float:
        state = start(base, batches[0][0])
        state, out = jax.block_until_ready(program(state, frozen, batches[-1]))
        began = time.perf_counter()
        for i in range(steps):
            state, out = program(state, frozen, batches[i % len(batches)])
        jax.block_until_ready((state, out))
        return time.perf_counter() - began

    facts = {
        "framework": "jax",
        "compile_seconds": seconds,
        "execution": execution_of(traced.jaxpr, variant.lora, frozen),
        "trained_parameters": _trained(variant, state),
        **_memory(program),
    }
    return Program(variant.name, stretch, facts)


def _trained(variant: Variant, state) -> int:
    return 0 if variant.lora is None else sum(x.size for x in jax.tree.leaves(state[0]))


def _memory(program) -> dict[str, int]:
    """What XLA plans, in bytes: ``memory_bytes`` and its parts; nothing where it does not tell."""
    found = program.memory_analysis()
    if found is None:
        return {}
    parts = {
        "arguments": found.argument_size_in_bytes,
        "temp": found.temp_size_in_bytes,
        "output": found.output_size_in_bytes,
        "alias": found.alias_size_in_bytes,
    }
    total = parts["arguments"] + parts["temp"] + parts["output"] - parts["alias"]
    return {"memory_bytes": total, "memory_parts": parts}

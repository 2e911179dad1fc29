"""Programs timed against each other: in turns, in stretches that a clock can tell apart."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rmlora_jax.bench.compiled import Program

LEAST_SECONDS = 0.2  # of a stretch
OUT_OF_MEMORY = "out of memory"


def measure(
    programs: Sequence[Program],
    *,
    repeats: int,
    steps: int | None = None,
    least: float = LEAST_SECONDS,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Milliseconds a step of each program, over ``repeats`` turns of all of them.

    The turns go through the programs forwards and backwards by turns, so that a machine that grows
    slower meanwhile favours none of them. A program that runs out of memory takes no further part.

    Args:
      programs: what is timed; names are unique.
      repeats: turns.
      steps: steps of a stretch; None: as many as take ``least`` seconds, for each program.
      say: where progress goes.

    Returns:
      name -> ``{"steps": of a stretch, "ms": [a step's, for each repeat], "error": None}``, or with
      ``error="out of memory"`` and no times.
    """
    found = {p.name: {"steps": steps, "ms": [], "error": None} for p in programs}
    for program in programs:
        row = found[program.name]
        with_memory(row, lambda p=program, r=row: r.update(steps=steps or enough(p, least)))
    for repeat in range(repeats):
        for program in programs[:: -1 if repeat % 2 else 1]:
            row = found[program.name]

            def run(program=program, row=row):
                row["ms"].append(1000 * program.stretch(row["steps"]) / row["steps"])

            with_memory(row, run)
        say(f"repeat {repeat + 1}/{repeats}")
    return found


def enough(program: Program, least: float) -> int:
    """Steps of a stretch of at least ``least`` seconds; the stretches tried warm the program up."""
    steps, seconds = 1, program.stretch(1)
    while seconds < least:
        wanted = math.ceil(1.2 * steps * least / max(seconds, 1e-9))
        steps = min(10 * steps, max(wanted, steps + 1))
        seconds = program.stretch(steps)
    return steps


def with_memory(row: dict, action: Callable[[], Any]) -> None:
    """Runs ``action`` unless the row has an error; lack of memory becomes the row's error."""
    if row["error"] is not None:
        return
    try:
        action()
    except Exception as error:
        if not is_short(error):
            raise
        row.update(ms=[], error=OUT_OF_MEMORY)
    if row["error"]:
        gc.collect()  # the frames of the error held what did not fit


def is_short(error: Exception) -> bool:
    """Whether an error of XLA or of torch says that memory is exhausted."""
    words = str(error)
    return "RESOURCE_EXHAUSTED" in words or "CUDA out of memory" in words


def product_program(dtype: Any) -> tuple[Program, int]:
    """A large matrix product that is repeated, and its flops: how fast the device computes at best.

    8192 x 8192 in the compute dtype, 1024 x 1024 on a CPU, normal entries.
    """
    side = 1024 if jax.default_backend() == "cpu" else 8192
    draw = jax.jit(lambda key: jax.random.normal(key, (2, side, side), dtype) / side**0.5)
    multiply = jax.jit(jnp.matmul)

    def stretch(steps: int) -> float:
        x, y = draw(jax.random.key(0))
        x = multiply(x, y).block_until_ready()
        began = time.perf_counter()
        for _ in range(steps):
            x = multiply(x, y)
        x.block_until_ready()
        return time.perf_counter() - began

    return Program("product", stretch, {"side": side}), 2 * side**3

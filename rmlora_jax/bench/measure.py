"""Programs timed: against each other, in turns; and kernel by kernel, from a profiler's trace."""

import collections
import gc
import gzip
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rmlora_jax.parallel import memory

LEAST_SECONDS = 0.2  # of a stretch
TRACED_STEPS = 3


class Program(NamedTuple):
    """A training step that can be timed, in JAX or another framework."""

    name: str  # of its row
    stretch: Callable[[int], float]  # a number of steps -> the seconds they took
    facts: dict[str, Any]  # what else is known of it, for ``bench.json``


def measure(
    programs: Sequence[Program],
    *,
    repeats: int,
    steps: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Milliseconds a step of each program, over ``repeats`` turns of all of them.

    The order of the programs alternates from turn to turn, so that a machine that slows down
    favours none of them. A program that runs out of memory is left out of later turns. Without
    ``steps``, `enough` finds how many steps a stretch of each program has.

    Returns:
      name -> ``{"steps": of a stretch, "ms": [a step's, for each repeat], "error": None}``, or with
      ``error="out of memory"`` and no times.
    """
    found = {p.name: {"steps": steps, "ms": [], "error": None} for p in programs}

    def warm_up(program: Program, row: dict) -> None:
        row["steps"] = steps or enough(program)

    def turn(program: Program, row: dict) -> None:
        row["ms"].append(1000 * program.stretch(row["steps"]) / row["steps"])

    for program in programs:
        with_memory(found[program.name], warm_up, program, found[program.name])
    for repeat in range(repeats):
        for program in programs[:: -1 if repeat % 2 else 1]:
            with_memory(found[program.name], turn, program, found[program.name])
        say(f"repeat {repeat + 1}/{repeats}")
    return found


def enough(program: Program) -> int:
    """Steps of a stretch of ``LEAST_SECONDS`` or more; those tried warm the program up."""
    steps, seconds = 1, program.stretch(1)
    while seconds < LEAST_SECONDS:
        wanted = math.ceil(1.2 * steps * LEAST_SECONDS / max(seconds, 1e-9))
        steps = min(10 * steps, max(wanted, steps + 1))
        seconds = program.stretch(steps)
    return steps


def with_memory(row: dict, action: Callable, *arguments: Any) -> None:
    """Calls ``action`` unless the row has an error; lack of memory becomes the row's error."""
    if row["error"] is not None:
        return
    try:
        action(*arguments)
    except Exception as error:
        if not memory.is_short(error):
            raise
        row.update(ms=[], error="out of memory")
    if row["error"]:
        gc.collect()  # the frames of the error held what did not fit


def product_program(dtype: Any) -> tuple[Program, int]:
    """A large matrix product and its flops, to find how fast the device computes at best.

    It is 8192 x 8192 with normal entries in the compute dtype, 1024 x 1024 on a CPU.
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


def profile(program: Program) -> list[dict[str, Any]]:
    """What the device did in a step: ``[{"kernel", "ms", "calls"}, ...]``, the longest first.

    The trace includes the initial state, which takes little time beside the steps. The list is
    empty where the platform traces no kernels (CPU).
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            program.stretch(TRACED_STEPS)
        events = []
        for file in Path(folder).rglob("*.trace.json.gz"):
            events += json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return kernels(events, TRACED_STEPS + 1)  # and the step that is not timed


def kernels(events: Iterable[Mapping[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The kernels among the events of a trace in Chrome's format, summed by name.

    >>> lane = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}}
    >>> stream = {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "Stream"}}
    >>> one = {"ph": "X", "pid": 1, "tid": 2, "name": "gemm_3", "dur": 500.0}
    >>> kernels([lane, stream, one, one | {"name": "gemm_7"}], steps=2)
    [{'kernel': 'gemm', 'ms': 0.5, 'calls': 1.0}]
    """
    events = list(events)
    named = {}
    for e in events:
        if e.get("ph") == "M" and "name" in e.get("args", {}):
            place = (e["pid"], e.get("tid") if e["name"] == "thread_name" else None)
            named[place] = str(e["args"]["name"])
    found = collections.defaultdict(lambda: [0.0, 0])
    for e in events:
        on_device = "/device:" in named.get((e.get("pid"), None), "")
        if e.get("ph") != "X" or not on_device:
            continue
        if not named.get((e["pid"], e.get("tid")), "").startswith("Stream"):
            continue  # the same again by module and by operation
        # XLA tells equal fusions apart by a number.
        total = found[re.sub(r"(_\d+)+$", "", e["name"])]
        total[0] += e.get("dur", 0.0)
        total[1] += 1
    rows = [
        {"kernel": k, "ms": us / 1000 / steps, "calls": n / steps} for k, (us, n) in found.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])

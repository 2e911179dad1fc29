"""Where the time of a step goes: kernels of the device by name, from a trace of JAX's profiler."""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rmlora_jax.bench.compiled import Program
from rmlora_jax.bench.table import markdown_table, number

STEPS = 3
SHOWN = 12

# What a kernel does, by its name; the first that matches.
KINDS = (
    ("attention", r"fmha|flash|sdpa|attention|cudnn_generated"),
    ("matrix products", r"gemm|cutlass|cublas|nvjet|xmma|splitk|dot"),
    ("copies", r"memcpy|memset|copy|transpose|dynamic.update.slice|concatenate"),
    ("sums", r"reduc"),
    ("element by element", r"fusion|wrapped|loop|triton"),
)


def profile(program: Program, steps: int = STEPS) -> list[dict[str, Any]]:
    """What the device did in a step: ``[{"kernel", "ms", "calls"}, ...]``, the longest first.

    The trace is of ``steps`` timed steps and of the one before them; the making of the first state,
    which is in it, too, is small beside them. Empty where the platform traces no kernels (CPU).
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            program.stretch(steps)
        events = []
        for file in Path(folder).rglob("*.trace.json.gz"):
            events += json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return kernels(events, steps + 1)


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
        total = found[_plain(e["name"])]
        total[0] += e.get("dur", 0.0)
        total[1] += 1
    rows = [{"kernel": k, "ms": us / 1000 / steps, "calls": n / steps} for k, (us, n) in
            found.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def kind(kernel: str) -> str:
    """
    >>> kind("nvjet_tst_128x256"), kind("input_reduce_fusion"), kind("loop_add_fusion")
    ('matrix products', 'sums', 'element by element')
    """
    return next((name for name, words in KINDS if re.search(words, kernel, re.I)), "other")


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown: the sums by kind, then the longest kernels."""
    whole = sum(row["ms"] for row in rows)
    kinds = collections.Counter()
    for row in rows:
        kinds[kind(row["kernel"])] += row["ms"]
    lines = [("kernel", "ms a step", "share", "calls a step")]
    lines += [(f"**{k}**", number(ms), f"{100 * ms / whole:.0f} %", "")
              for k, ms in kinds.most_common()]
    lines += [(f"`{row['kernel'][:70]}`", number(row["ms"]), f"{100 * row['ms'] / whole:.0f} %",
               f"{row['calls']:.0f}") for row in rows[:SHOWN]]
    return markdown_table(lines)


def _plain(name: str) -> str:
    """Without the number by which XLA tells equal fusions apart."""
    return re.sub(r"(_\d+)+$", "", name)

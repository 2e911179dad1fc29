"""The results of a bench in figures and words.

Every figure of a row follows from the repeats that ``bench.json`` stores.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmlora_jax.report.records import amount
from rmlora_jax.report.style import markdown_table

RATIOS = ("floor", "lora")
SHOWN = 12  # kernels of a profile

# What a kernel does, by its name; the first that matches.
KINDS = (
    ("attention", r"fmha|flash|sdpa|attention|cudnn_generated"),
    ("matrix products", r"gemm|cutlass|cublas|nvjet|xmma|splitk|dot"),
    ("copies", r"memcpy|memset|copy|transpose|dynamic.update.slice|concatenate"),
    ("sums", r"reduc"),
    ("element by element", r"fusion|wrapped|loop|triton"),
)


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


class Row(NamedTuple):
    """A row of the table; figures that a row does not have are None."""

    name: str  # of the step
    ms: Spread | None  # a step, over the repeats
    ratios: dict[str, Spread]  # to the rows "floor" and "lora", over pairs of the same repeat
    rate: float | None  # examples a second, from the median
    memory: int | None  # bytes
    share: float | None  # flops over what the best repeat of the product did in the same time
    compile_seconds: float | None
    note: str  # why there are no figures, or ""


def spread(values: Sequence[float]) -> Spread:
    """
    >>> spread([1.0, 2.0, 3.0, 4.0, 10.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return Spread(median, low, high)


def limit(results: Mapping[str, Any]) -> float | None:
    """Floating-point operations a second that the large matrix product reached."""
    times = results["product"]["ms"]
    return 1000 * results["product"]["flops"] / min(times) if times else None


def table_rows(results: Mapping[str, Any]) -> list[Row]:
    """The rows of what ``rmlora_jax.bench.run.bench`` returned."""
    times = {p["name"]: p["ms"] for p in results["programs"] if p.get("ms")}
    return [_row(p, times, results["options"]["batch"], limit(results))
            for p in results["programs"]]


def _row(program, times, batch, most) -> Row:
    ms = times.get(program["name"])
    memory, seconds = program.get("memory_bytes"), program.get("compile_seconds")
    if not ms:
        note = program["error"] or "not measured"
        return Row(program["name"], None, {}, None, memory, None, seconds, note)
    ratios = {name: spread(np.divide(ms, times[name])) for name in RATIOS if name in times}
    own = spread(ms)
    share = None
    if most and program.get("flops"):
        share = 1000 * program["flops"] / own.median / most
    return Row(program["name"], own, ratios, 1000 * batch / own.median, memory, share, seconds, "")


HEAD = ("step", "ms", "quartiles", "x floor", "x lora", "examples/s", "memory", "of limit",
        "compile")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's text, its head first; columns that are empty in every row are left out."""
    body = [(r.name, *_figures(r)) for r in rows]
    keep = [i for i in range(len(HEAD)) if i < 2 or any(line[i] for line in body)]
    return [tuple(line[i] for i in keep) for line in (HEAD, *body)]


def _figures(row: Row) -> tuple[str, ...]:
    compiled = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f} s"
    memory = "" if row.memory is None else amount(row.memory)
    if row.ms is None:
        return row.note, "", "", "", "", memory, "", compiled
    ratios = ["", ""]
    for i, name in enumerate(RATIOS):
        if found := row.ratios.get(name):
            ratios[i] = f"{found.median:.3f} ({found.low:.3f} - {found.high:.3f})"
    share = "" if row.share is None else f"{100 * row.share:.0f} %"
    quartiles = f"{number(row.ms.low)} - {number(row.ms.high)}"
    return number(row.ms.median), quartiles, *ratios, f"{row.rate:,.0f}", memory, share, compiled


def number(value: float) -> str:
    """Three digits or more, without an exponent.

    >>> number(0.01234), number(3.14159), number(70.94), number(1650.4)
    ('0.0123', '3.14', '70.9', '1,650')
    """
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits)}f}"


def what(results: Mapping[str, Any]) -> str:
    """One line about what was timed, without what is swept."""
    o = results["options"]
    swept = o["sweep"]
    size = f"{o['length']} tokens" if o["length"] else f"{results['tokens']} tokens"
    if o["image_size"]:
        size = f"{o['image_size']} px, {size}"
    parts = [o["model"]]
    parts += [f"batch {o['batch']}"] if swept != "batch" else []
    parts += [size] if swept != "length" else []
    parts += [f"rank {o['rank']}"] if swept != "rank" else []
    parts += [f"adapters on {o['modules']}"] if o["modules"] != "all" and not swept else []
    dtype = o["dtype"] if o["dtype"] == o["base_dtype"] else f"{o['dtype']} on {o['base_dtype']}"
    return ", ".join([*parts, dtype, f"unroll {o['unroll']}", f"remat {o['remat']}"])


def footer(results: Mapping[str, Any]) -> str:
    """What the limit is."""
    most, side = limit(results), results["product"]["side"]
    if most is None:
        return ""
    rate = f"{most / 1e12:.3g} TFLOP/s" if most >= 1e12 else f"{most / 1e9:.3g} GFLOP/s"
    return (f"limit: {rate}, the best of a {results['options']['dtype']} product"
            f" of {side} x {side} on the same device")


def markdown(results: Mapping[str, Any]) -> str:
    """What ``bench.md`` holds."""
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    ran = sorted({p["execution"] for p in results["programs"] if p.get("execution")})
    notes = [footer(results), f"factors ran {' and '.join(ran)}" if ran else "", versions]
    head = f"{what(results)}, on {results['device']}"
    table = markdown_table(cells(table_rows(results)))
    kernels = "".join(f"\n{p['name']}:\n\n{kernel_table(p['profile'])}\n"
                      for p in results["programs"] if p.get("profile"))
    return "\n\n".join([head, table, *(note for note in notes if note)]) + "\n" + kernels


def kernel_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown: the sums by kind, then the longest kernels."""
    whole = sum(row["ms"] for row in rows)
    kinds = collections.Counter()
    for row in rows:
        name = next((k for k, words in KINDS if re.search(words, row["kernel"], re.I)), "other")
        kinds[name] += row["ms"]
    lines = [("kernel", "ms a step", "share", "calls a step")]
    lines += [(f"**{k}**", number(ms), f"{100 * ms / whole:.0f} %", "")
              for k, ms in kinds.most_common()]
    lines += [(f"`{row['kernel'][:70]}`", number(row["ms"]), f"{100 * row['ms'] / whole:.0f} %",
               f"{row['calls']:.0f}") for row in rows[:SHOWN]]
    return markdown_table(lines)

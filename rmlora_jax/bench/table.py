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
    memory: int | None  # bytes
    compile_seconds: float | None
    ms: Spread | None = None  # a step, over the repeats
    ratios: Mapping[str, Spread] = {}  # to the rows "floor" and "lora", of the same repeats
    rate: float | None = None  # examples a second, from the median
    share: float | None = None  # flops over what the best repeat of the product did in that time
    note: str = ""  # why there are no figures


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
    """The rows of what ``rmlora_jax.bench.__main__.bench`` returned."""
    times = {p["name"]: p["ms"] for p in results["programs"] if p.get("ms")}
    most, rows = limit(results), []
    for p in results["programs"]:
        row = Row(p["name"], p.get("memory_bytes"), p.get("compile_seconds"))
        if row.name not in times:
            rows.append(row._replace(note=p["error"] or "not measured"))
            continue
        own = spread(times[row.name])
        rows.append(row._replace(
            ms=own,
            ratios={n: spread(np.divide(times[row.name], times[n])) for n in RATIOS if n in times},
            rate=1000 * results["options"]["batch"] / own.median,
            share=1000 * p["flops"] / own.median / most if most and p.get("flops") else None,
        ))
    return rows


HEAD = ("step", "ms", "quartiles", "x floor", "x lora", "examples/s", "memory", "of limit",
        "compile")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table's text, its head first; columns that are empty in every row are left out."""
    body = [(r.name, *_figures(r)) for r in rows]
    keep = [i for i in range(len(HEAD)) if i < 2 or any(line[i] for line in body)]
    return [tuple(line[i] for i in keep) for line in (HEAD, *body)]


def _figures(row: Row) -> tuple[str, ...]:
    ms, ratios = row.ms, [row.ratios.get(name) for name in RATIOS]
    return (
        number(ms.median) if ms else row.note,
        f"{number(ms.low)} - {number(ms.high)}" if ms else "",
        *(f"{r.median:.3f} ({r.low:.3f} - {r.high:.3f})" if r else "" for r in ratios),
        "" if row.rate is None else f"{row.rate:,.0f}",
        "" if row.memory is None else amount(row.memory),
        "" if row.share is None else f"{100 * row.share:.0f} %",
        "" if row.compile_seconds is None else f"{row.compile_seconds:.1f} s",
    )


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
    """The limit in words, for the line below a table."""
    most, side = limit(results), results["product"]["side"]
    if most is None:
        return ""
    rate = f"{most / 1e12:.3g} TFLOP/s" if most >= 1e12 else f"{most / 1e9:.3g} GFLOP/s"
    return (f"limit: {rate}, the best of a {results['options']['dtype']} product"
            f" of {side} x {side} on the same device")


def markdown(results: Mapping[str, Any]) -> str:
    """The text of ``bench.md``."""
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

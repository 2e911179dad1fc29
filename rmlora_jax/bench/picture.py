"""The pictures: bars of time and memory for one bench, lines of cost for a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmlora_jax.bench.table import Row, footer, number, table_rows, what
from rmlora_jax.report import style
from rmlora_jax.report.records import amount
from rmlora_jax.report.style import GRID, INK, MUTED

FLOOR = "#9aa1ad"
TORCH = "#b8a100"
STROKES = ("-", "--", ":", "-.")
LABELS = {
    "peft_lora": "PEFT lora",
    "peft_rm_lora": "PEFT rm_lora,\nauthors' loops",
    "floor": "floor\n(nothing trained)",
}


def bench_figure(results: Mapping[str, Any], rows: Sequence[Row]):
    """A bar of milliseconds for each row with its quartiles, and one of memory beside it."""
    wide = any(row.memory for row in rows)
    figure = style.new_figure(11.5 if wide else 8.5, 1.6 + 0.62 * len(rows))
    grid = {"width_ratios": [2.1, 1]} if wide else {}
    time, *rest = figure.subplots(1, 1 + wide, sharey=True, gridspec_kw=grid, squeeze=False)[0]
    tints = [colour(row.name) for row in rows]
    bars = {"height": 0.62, "color": tints, "zorder": 2}
    time.barh(range(len(rows)), [row.ms.median if row.ms else 0 for row in rows], **bars)
    reach = max([row.ms.high for row in rows if row.ms], default=1)
    for y, row in enumerate(rows):
        if row.ms is None:
            time.text(0.01 * reach, y, row.note, va="center", fontsize=10, color=MUTED)
            continue
        for tint, width in (("white", 3.6), (INK, 1.6)):
            time.plot([row.ms.low, row.ms.high], [y, y], color=tint, lw=width, zorder=4)
            for end in (row.ms.low, row.ms.high):
                time.plot([end, end], [y - 0.11, y + 0.11], color=tint, lw=width, zorder=4)
        words = f"{number(row.ms.median)} ms"
        ratio = row.ratios.get("floor")
        time.annotate(words, (row.ms.high, y), xytext=(7, 0), textcoords="offset points",
                      va="center", fontsize=10.5, color=INK, fontweight="bold")
        if ratio and row.name != "floor":
            time.annotate(f"{ratio.median:.2f} x floor", (row.ms.high, y), fontsize=9.5,
                          xytext=(14 + 7.1 * len(words), 0), textcoords="offset points",
                          va="center", color=MUTED)
    floor = next((row.ms.median for row in rows if row.name == "floor" and row.ms), None)
    if floor:
        time.axvline(floor, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
    time.set_xlim(0, 1.42 * reach)
    time.set_ylim(len(rows) - 0.4, -0.6)
    time.set_yticks(range(len(rows)), [_label(row.name) for row in rows])
    style.finish(time, "A training step", "milliseconds, median and quartiles", grid="x")
    _quiet(time)
    for memory in rest:
        unit, one = ("GiB", 2**30) if max(row.memory or 0 for row in rows) >= 2**30 else (
            "MiB", 2**20)
        sizes = [(row.memory or 0) / one for row in rows]
        memory.barh(range(len(rows)), sizes, **bars)
        for y, row in enumerate(rows):
            if row.memory:
                memory.annotate(amount(row.memory), (sizes[y], y), xytext=(6, 0),
                                textcoords="offset points", va="center", fontsize=10, color=INK)
        memory.set_xlim(0, 1.4 * max(sizes))
        style.finish(memory, "Memory", unit, grid="x")
        _quiet(memory)
        memory.tick_params(axis="y", labelleft=False)
    figure.tight_layout(w_pad=2)
    _title(figure, results)
    words = footer(results)
    share = [f"{row.name.replace('peft_', 'PEFT ')} {100 * row.share:.0f} %"
             for row in rows if row.share]
    if share:
        words += f"; of it: {', '.join(share)}"
    style.caption(figure, words)
    return figure


def sweep_figure(found: Mapping[str, Any]):
    """Milliseconds against what is swept, and the ratios to the floor at each value."""
    from matplotlib.ticker import LogLocator

    values, benches = found["values"], found["benches"]
    tables = [{row.name: row for row in table_rows(results)} for results in benches]
    names = list(dict.fromkeys(name for rows in tables for name in rows))
    figure = style.new_figure(11.5, 4.4)
    time, ratio = figure.subplots(1, 2)
    numbers = not isinstance(values[0], str)
    places = values if numbers else list(range(len(values)))
    for name in names:
        # One method in several forms keeps its colour; what sets them apart is the stroke.
        forms = [other for other in names if method_of(other) == method_of(name)]
        stroke = STROKES[forms.index(name) % len(STROKES)]
        _line(time, places, [rows[name].ms for rows in tables], name, stroke)
        if name != "floor":
            ratios = [rows[name].ratios.get("floor") for rows in tables]
            _line(ratio, places, ratios, name, stroke)
    ratio.axhline(1, color=FLOOR, lw=2, zorder=1)
    ratio.annotate("floor", (1, 1), xycoords=("axes fraction", "data"), xytext=(4, 0),
                   textcoords="offset points", va="center", fontsize=9.5, color=MUTED)
    low, high = ratio.get_ylim()
    ratio.set_ylim(min(low, 0.95), max(high, 1.25))
    for ax in (time, ratio):
        if numbers:
            ax.set_xscale("log", base=2)
        else:
            ax.set_xlim(-0.3, len(values) - 0.7)
        ax.set_xticks(places, [str(value) for value in values])
    if found["sweep"] in ("batch", "length"):
        time.set_yscale("log")
        time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        time.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        time.set_ylim(0, 1.15 * time.get_ylim()[1])
    for ax in (time, ratio):
        ax.minorticks_off()
    xlabel = {"batch": "examples a step", "length": "tokens", "modules": "adapted linear layers",
              "rank": "rank"}[found["sweep"]]
    style.finish(time, "A training step", xlabel, "milliseconds")
    style.finish(ratio, "Over the floor", xlabel, "x the floor in the same repeat")
    time.legend(frameon=False, fontsize=10, handlelength=4)
    figure.tight_layout(w_pad=3)
    _title(figure, benches[0])
    style.caption(figure, "Medians; bands: quartiles over the repeats, in which the variants take "
                  "turns. The floor is the loss and its gradient with respect to the encoder's "
                  "input; nothing is trained.")
    return figure


def _line(ax, places, found, name: str, stroke: str) -> None:
    """A line through the medians with the band of the quartiles; values without one are gaps."""
    there = [(x, s) for x, s in zip(places, found, strict=True) if s is not None]
    if not there:
        return
    x = [place for place, _ in there]
    tint = colour(name)
    ax.fill_between(x, [s.low for _, s in there], [s.high for _, s in there], color=tint,
                    alpha=0.18, lw=0)
    ax.plot(x, [s.median for _, s in there], color=tint, lw=2, ls=stroke, marker="o", ms=6,
            mec="white", mew=1, label=name)


def method_of(name: str) -> str:
    """The method of a row, such as ``"lora"`` of ``"lora:execution=merged"``."""
    return name.partition(":")[0]


def colour(name: str) -> str:
    """A method's own colour, as in all pictures of the library; grey for the floor."""
    name = method_of(name)
    if name == "floor":
        return FLOOR
    return TORCH if name.startswith("peft") else style.colour(name)


def _label(name: str) -> str:
    """What stands at a bar: flags of its own below the method."""
    method, *own = name.split(":")
    return f"{method}\n{', '.join(own)}" if own else LABELS.get(name, name)


def _quiet(ax) -> None:
    ax.tick_params(axis="y", labelsize=10.5, labelcolor=INK)
    ax.spines["left"].set_color(GRID)


def _title(figure, results: Mapping[str, Any]) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.1 / width, 1 + 0.34 / height, f"{what(results)}", fontsize=13, color=INK,
                fontweight="bold", va="bottom")
    figure.text(0.1 / width, 1 + 0.06 / height, f"on {results['device']}, jax "
                f"{results['versions']['jax']}", fontsize=10, color=MUTED, va="bottom")

"""The pictures of a study, each from its rows; those over steps are in `lines`."""

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmlora_jax.files import write_bytes_atomic
from rmlora_jax.report import style
from rmlora_jax.study.lines import CAPTION, frequency_picture, gap_picture
from rmlora_jax.study.plan import FINAL
from rmlora_jax.study.tables import (
    Group,
    by_task,
    distinct,
    groups,
    parameters,
    short,
    shown,
    spread,
    thousands,
    unit,
    values,
)

ACROSS = 4  # maps of layers beside each other
LONG = {"penalty": "penalty strength λ", "keep": "keep probability"}


def write_pictures(
    rows: Sequence[dict[str, Any]], folder: str | os.PathLike, names: Iterable[str], along: str
) -> list[Path]:
    """Draws ``folder/NAME.png`` for each of ``names`` and returns the paths of those drawn."""
    drawn = [draw(rows, Path(folder) / f"{name}.png", name, along) for name in names]
    return [path for path in drawn if path is not None]


def draw(rows: Sequence[dict[str, Any]], path: Path, name: str, along: str) -> Path | None:
    """Draws one of `PICTURES` from the rows of stage "final"; None where they lack its figures, as
    methods without factors lack the effective rank."""
    final = [row for row in rows if row["stage"] == FINAL]
    figure = PICTURES[name](final, along) if final else None
    if figure is None:
        return None
    return write_bytes_atomic(path, style.png(figure, crop=True))


def table_picture(rows: Sequence[dict], along: str = "method"):
    """A panel a task: for each method its seeds, mean and deviation, and what it trains."""
    tasks = by_task(rows)
    names = list(dict.fromkeys(group.label for group in groups(rows)))
    room = 1.0 + 0.08 * max(map(len, names))  # inches for the names
    panel, figures = 3.3, 2.2  # for the dots, and beside them for numbers
    width, height = room + len(tasks) * (panel + figures), 1.3 + 0.46 * len(names)
    figure = style.new_figure(width, height)
    limits = {}  # by data set: two tasks of one data set have one axis
    for place, (task, own) in enumerate(tasks.items()):
        left = room + place * (panel + figures)
        ax = figure.add_axes((left / width, 0.65 / height, panel / width, 1 - 1.25 / height))
        found, first = {group.label: group for group in own}, own[0].rows[0]
        results = {name: group.scaled("test") for name, group in found.items()}
        low, high = _limits(found, results)
        limits.setdefault(first["dataset"], []).append((ax, low, high))
        for y, name in enumerate(names):
            if name not in found:
                continue
            group, numbers = found[name], results[name]
            tint = style.colour(group.method)
            if numbers and low <= statistics.mean(numbers) <= high:
                style.strip(ax, y, numbers, tint, along="x")
            elif numbers:  # far off: an arrow says on which side
                below = statistics.mean(numbers) < low
                inside = 0.02 * (high - low)
                ax.plot(low + inside if below else high - inside, y, "<" if below else ">", ms=7,
                        color=tint, zorder=5)
            count = thousands(parameters(group.rows)[0])
            right = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 10}
            ax.text(1.04, y, spread(numbers), color=style.INK, **right)
            ax.text(1.56, y, count or "head only", color=style.MUTED, ha="right", **right)
        head = {"transform": ax.transAxes, "fontsize": 9, "color": style.MUTED, "va": "bottom"}
        ax.text(1.04, 1.02, "mean ± sd", **head)
        ax.text(1.56, 1.02, "trained", ha="right", **head)
        style.finish(ax, task, f"test {unit(first['metric'])}", grid="x")
        style.rows(ax, names)
        ax.tick_params(axis="y", labelleft=place == 0)
    for panels in limits.values():
        for ax, *_ in panels:
            ax.set_xlim(min(low for _, low, _ in panels), max(high for *_, high in panels))
    style.caption(figure, CAPTION + "  Arrow: off the scale.  trained: parameters at the end, "
                  "without the head.")
    return figure


def _limits(found: dict[str, Group], results: dict[str, list[float]]) -> tuple[float, float]:
    """The part of the axis where methods with factors lie, and half as much to either side; all of
    it, where the others are no farther away."""
    every = [v for numbers in results.values() for v in numbers]
    near = [v for name, numbers in results.items() for v in numbers
            if values(found[name].rows, "effective_rank")] or every
    reach = 0.75 * (max(near) - min(near)) or 1.0
    low, high = max(min(every), min(near) - reach), min(max(every), max(near) + reach)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def dimension_picture(rows: Sequence[dict], along: str = "method"):
    """Effective rank of Delta W at the end, and of the whole trajectory where it was kept.

    A column of dots for each value of ``along``, a colour for each method.
    """
    rows = [row for row in rows if row["effective_rank"] is not None]
    if not rows:
        return None
    tasks = ["all tasks"] if along == "task" else distinct(rows, "task")
    wide = any(row["trajectory"] for row in rows)
    columns = list(dict.fromkeys(_along(row, along) for row in rows))
    methods = distinct(rows, "method")
    panel = max(4.2, 0.95 * len(columns) + 0.8)
    xlabel = "" if along in ("method", "task") else short(along)
    figure = style.new_figure(panel * (1 + wide) + 1, 3.4 * len(tasks))
    axes = figure.subplots(len(tasks), 1 + wide, squeeze=False)
    for line, task in zip(axes, tasks, strict=True):
        here = [row for row in rows if along == "task" or row["task"] == task]
        _columns(line[0], here, along, columns, methods, lambda row: row["effective_rank"])
        for x, column in enumerate(columns):  # a dash at the most that Delta W's rank could be
            for rank in sorted({row["rank"] for row in here if _along(row, along) == column}):
                line[0].plot([x - 0.32, x + 0.32], [rank, rank], color=style.MUTED, lw=1.4,
                             ls=(0, (3, 2)))
                line[0].annotate(f"r = {rank}", (x, rank), xytext=(0, 3), ha="center",
                                 textcoords="offset points", fontsize=8.5, color=style.MUTED)
        low, high = line[0].get_ylim()
        line[0].set_ylim(low, high + 0.1 * (high - low))
        label = "" if along == "task" else f"{task}: "
        style.finish(line[0], f"{label}one update", xlabel, "effective rank of ΔW")
        if wide:
            kept = [row for row in here if row["trajectory"]]
            _columns(line[1], kept, along, columns, methods,
                     lambda row: row["trajectory"]["effective_rank"][-1])
            style.finish(line[1], f"{label}all increments", xlabel,
                         "effective rank of the trajectory")
            line[1].set_ylim(0, 1.15 * max(r["trajectory"]["effective_rank"][-1] for r in kept))
    if along != "method" and len(methods) > 1:
        style.key(axes[0][-1], methods, "o", loc="upper left", bbox_to_anchor=(1.01, 1),
                  handletextpad=0.2)
    figure.tight_layout(w_pad=2.5, h_pad=2)
    style.caption(figure, "Means over all modules and layers. One update ΔW = s A B has rank at "
                  "most r, dashed; what all its increments span may be larger.  " + CAPTION)
    return figure


def _columns(ax, rows, along, columns, methods, value):
    """Strips of dots: x by ``along``, beside each other by method."""
    beside = 1 if along == "method" else len(methods)
    for x, column in enumerate(columns):
        for i, method in enumerate(methods):
            numbers = [value(r) for r in rows if r["method"] == method
                       and _along(r, along) == column]
            shift = 0 if beside == 1 else 0.6 * ((i + 0.5) / beside - 0.5)
            style.strip(ax, x + shift, numbers, style.colour(method, methods), along="y")
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_xticks(range(len(columns)), [shown(c) for c in columns])


def _along(row: dict, along: str):
    if along in ("method", "task"):
        return row[along]
    return row["settings"].get(along, row["variant"].get(along, "default"))


def heat_picture(rows: Sequence[dict], along: str = "keep"):
    """A panel a task: the mean metric for every pair of two settings, the best one framed."""
    names = list(dict.fromkeys(n for row in rows for n in row["settings"] if n != "learning_rate"))
    if len(names) != 2:
        return None
    across = along if along in names else names[0]
    down = next(name for name in names if name != across)
    tasks = distinct(rows, "task")
    xs, ys = (sorted({row["settings"][n] for row in rows}) for n in (across, down))
    width, height = 1.05 * len(xs) + 1.7, 0.78 * len(ys) + 1.4
    figure = style.new_figure(width * len(tasks), height)
    for place, task in enumerate(tasks):
        ax = figure.add_subplot(1, len(tasks), place + 1)
        metric = next(row["metric"] for row in rows if row["task"] == task)
        means, spreads = (np.full((len(ys), len(xs)), np.nan) for _ in range(2))
        for group in by_task(rows)[task]:
            numbers, at = group.scaled("test"), dict(group.varied)
            if numbers:
                cell = ys.index(at[down]), xs.index(at[across])
                means[cell] = statistics.mean(numbers)
                spreads[cell] = statistics.stdev(numbers) if len(numbers) > 1 else np.nan
        _cells(ax, means, spreads)
        ax.set_xticks(range(len(xs)), [shown(x) for x in xs])
        ax.set_yticks(range(len(ys)), [shown(y) for y in ys])
        names = [LONG.get(name, short(name)) for name in (across, down)]
        style.finish(ax, f"{task}: test {unit(metric)}", names[0], names[1] * (place == 0), grid="")
        ax.tick_params(labelsize=10.5, labelcolor=style.INK)
    count = max(len(group.rows) for group in groups(rows))
    figure.tight_layout(w_pad=3)
    style.caption(figure, f"Mean of {count} seeds at the last step, below it the sample standard "
                  "deviation; framed: the largest mean. Penalty 0 and keep 1 is plain LoRA.")
    return figure


def _cells(ax, means, spreads):
    from matplotlib.patches import Rectangle

    low, high = np.nanmin(means), np.nanmax(means)
    across, down = (np.arange(count + 1) - 0.5 for count in means.shape[::-1])
    ax.pcolormesh(across, down, means, cmap="YlGnBu", vmin=low - 0.12 * (high - low), vmax=high,
                  edgecolors="white", linewidth=2)
    for (y, x), mean in np.ndenumerate(means):
        if math.isnan(mean):
            continue
        dark = (mean - low) / max(high - low, 1e-9) > 0.55
        ink = "white" if dark else style.INK
        ax.text(x, y + 0.06, f"{mean:.1f}", ha="center", va="center", fontsize=11.5, color=ink,
                fontweight="bold")
        if not math.isnan(spreads[y, x]):
            ax.text(x, y - 0.27, f"± {spreads[y, x]:.1f}", ha="center", va="center", fontsize=8.5,
                    color=ink, alpha=0.85)
    y, x = np.unravel_index(np.nanargmax(means), means.shape)
    ax.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, lw=3, ec="#d55e00",
                           zorder=5))
    ax.spines[:].set_visible(False)


def layers_picture(rows: Sequence[dict], along: str = "method"):
    """For every group a map: effective rank of Delta W, a row a layer, a column an evaluation."""
    found = [g for g in groups(rows) if any(row["layers"] for row in g.rows)]
    if not found:
        return None
    tasks = list(dict.fromkeys(group.task for group in found))
    if len(tasks) > 1:  # a row a task
        rows_of = [[g for g in found if g.task == task] for task in tasks]
    else:
        rows_of = [found[i : i + ACROSS] for i in range(0, len(found), ACROSS)]
    across = max(map(len, rows_of))
    maps = np.concatenate([np.ravel(_mean_map(group)[1]) for group in found])
    ranks = {group.rows[0]["rank"] for group in found}
    bound = max(ranks) if len(ranks) == 1 else math.ceil(10 * float(np.nanmax(maps))) / 10
    low = math.floor(10 * np.nanmin(maps)) / 10
    width, height = 2.35 * across + 1.3, 2.5 * len(rows_of) + 0.3
    figure = style.new_figure(width, height)
    axes = figure.subplots(len(rows_of), across, squeeze=False)
    for line, row in zip(axes, rows_of, strict=True):
        for i, ax in enumerate(line):
            if i >= len(row):
                ax.set_visible(False)
                continue
            _layers(ax, *_mean_map(row[i]), low, bound)
            title = f"{row[i].task} {row[i].label}" if len(tasks) > 1 else row[i].label
            below = "step" if row is rows_of[-1] else ""
            style.finish(ax, title, below, "layer" * (i == 0), grid="")
            ax.title.set_fontsize(10.5)
            ax.spines[:].set_visible(False)
    figure.tight_layout(w_pad=1.2, h_pad=1.4, rect=(0, 0, 1 - 0.95 / width, 1))
    place = figure.add_axes((1 - 0.75 / width, 1 - 2.2 / height, 0.16 / width, 1.75 / height))
    bar = figure.colorbar(axes[0][0].collections[0], cax=place)
    limit = f", at most {bound}" if len(ranks) == 1 else ""
    bar.set_label(f"effective rank of ΔW{limit}", color=style.MUTED, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=style.MUTED, labelsize=9, length=0)
    style.caption(figure, "Means over the kinds of modules of a layer, and over seeds. A column "
                  "is an evaluation.")
    return figure


def _layers(ax, steps, ranks, low: float, bound: float):
    ax.pcolormesh(np.arange(len(steps) + 1), np.arange(len(ranks) + 1) + 0.5, ranks, cmap="YlGnBu",
                  vmin=low, vmax=bound, rasterized=True)
    ax.set_ylim(len(ranks) + 0.5, 0.5)
    ticks = np.unique(np.linspace(0, len(steps) - 1, 3).round().astype(int))
    ax.set_xticks(ticks + 0.5, [f"{steps[t]:,}" for t in ticks])
    ax.set_yticks(range(1, len(ranks) + 1, 1 if len(ranks) <= 6 else 2))


def _mean_map(group) -> tuple[list[int], np.ndarray]:
    """Steps (T,) and the mean over seeds (layers, T)."""
    kept = [row["layers"] for row in group.rows if row["layers"]]
    steps = kept[0]["step"]
    same = [k for k in kept if k["step"] == steps]
    return steps, np.mean([np.array(k["effective_rank"]).T for k in same], axis=0)


# name -> function of (rows, along) that returns a matplotlib Figure, or None without such rows
PICTURES: dict[str, Callable] = {
    "table": table_picture,
    "heat": heat_picture,
    "frequency": frequency_picture,
    "gap": gap_picture,
    "layers": layers_picture,
    "dimension": dimension_picture,
}

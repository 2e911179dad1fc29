"""Values as colours: a metric over two settings, and the effective rank of layers over time."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from rmlora_jax.report.panels import INK, MUTED
from rmlora_jax.study import style
from rmlora_jax.study.tables import groups, scale, values

ACROSS = 4  # maps of layers beside each other


def heat_picture(rows: Sequence[dict], along: str = "keep"):
    """A panel a task: the mean metric for every pair of two settings, the best one framed."""
    names = list(dict.fromkeys(n for row in rows for n in row["settings"] if n != "learning_rate"))
    if len(names) != 2:
        return None
    across = along if along in names else names[0]
    down = next(name for name in names if name != across)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    xs, ys = (sorted({row["settings"][n] for row in rows}) for n in (across, down))
    width, height = 1.05 * len(xs) + 1.7, 0.78 * len(ys) + 1.4
    figure = style.new_figure(width * len(tasks), height)
    for place, task in enumerate(tasks):
        ax = figure.add_subplot(1, len(tasks), place + 1)
        metric = next(row["metric"] for row in rows if row["task"] == task)
        means, spreads = (np.full((len(ys), len(xs)), np.nan) for _ in range(2))
        for group in groups(rows):
            numbers = [scale(metric) * v for v in values(group.rows, "test")]
            at = dict(group.varied)
            if group.task == task and numbers:
                y, x = ys.index(at[down]), xs.index(at[across])
                means[y, x] = statistics.mean(numbers)
                spreads[y, x] = statistics.stdev(numbers) if len(numbers) > 1 else np.nan
        _cells(ax, means, spreads)
        ax.set_xticks(range(len(xs)), [style.shown(x) for x in xs])
        ax.set_yticks(range(len(ys)), [style.shown(y) for y in ys])
        style.finish(ax, f"{task}: test {style.axis(metric)}", _long(across),
                     _long(down) if place == 0 else "", grid="")
        ax.tick_params(labelsize=10.5, labelcolor=INK)
    count = max(len(group.rows) for group in groups(rows))
    figure.tight_layout(w_pad=3)
    style.caption(figure, f"Mean of {count} seeds at the last step, below it the sample standard "
                  "deviation; framed: the largest mean. Penalty 0 and keep 1 is plain LoRA.")
    return figure


def _long(name: str) -> str:
    return {"penalty": "penalty strength λ", "keep": "keep probability"}.get(
        name, style.short(name))


def _cells(ax, means, spreads):
    from matplotlib.patches import Rectangle

    low, high = np.nanmin(means), np.nanmax(means)
    image = ax.pcolormesh(np.arange(means.shape[1] + 1) - 0.5, np.arange(means.shape[0] + 1) - 0.5,
                          means, cmap="YlGnBu", vmin=low - 0.12 * (high - low), vmax=high,
                          edgecolors="white", linewidth=2)
    for (y, x), mean in np.ndenumerate(means):
        if math.isnan(mean):
            continue
        dark = (mean - low) / max(high - low, 1e-9) > 0.55
        ink = "white" if dark else INK
        ax.text(x, y + 0.06, f"{mean:.1f}", ha="center", va="center", fontsize=11.5, color=ink,
                fontweight="bold")
        if not math.isnan(spreads[y, x]):
            ax.text(x, y - 0.27, f"± {spreads[y, x]:.1f}", ha="center", va="center", fontsize=8.5,
                    color=ink, alpha=0.85)
    y, x = np.unravel_index(np.nanargmax(means), means.shape)
    ax.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, lw=3, ec="#d55e00",
                           zorder=5))
    ax.spines[:].set_visible(False)
    return image


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
    maps = [_mean_map(group) for group in found]
    ranks = {group.rows[0]["rank"] for group in found}
    high = max(float(np.nanmax(m)) for _, m in maps)
    bound = max(ranks) if len(ranks) == 1 else math.ceil(10 * high) / 10
    low = math.floor(10 * min(np.nanmin(m) for _, m in maps)) / 10
    width, height = 2.35 * across + 1.3, 2.5 * len(rows_of) + 0.3
    figure = style.new_figure(width, height)
    axes = figure.subplots(len(rows_of), across, squeeze=False)
    for line, row in zip(axes, rows_of, strict=True):
        for i, ax in enumerate(line):
            if i >= len(row):
                ax.set_visible(False)
                continue
            image = _layers(ax, *_mean_map(row[i]), low, bound)
            words = [row[i].task] * (len(tasks) > 1) + [row[i].method] + [
                f"{style.short(n)} {style.shown(v)}" for n, v in row[i].varied]
            below = "step" if row is rows_of[-1] else ""
            style.finish(ax, " ".join(words), below, "layer" * (i == 0), grid="")
            ax.title.set_fontsize(10.5)
            ax.spines[:].set_visible(False)
    figure.tight_layout(w_pad=1.2, h_pad=1.4, rect=(0, 0, 1 - 0.95 / width, 1))
    place = figure.add_axes((1 - 0.75 / width, 1 - 2.2 / height, 0.16 / width, 1.75 / height))
    bar = figure.colorbar(image, cax=place)
    limit = f", at most {bound}" if len(ranks) == 1 else ""
    bar.set_label(f"effective rank of ΔW{limit}", color=MUTED, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=9, length=0)
    style.caption(figure, "Means over the kinds of modules of a layer, and over seeds. "
                  "A column is an evaluation.")
    return figure


def _layers(ax, steps, ranks, low: float, bound: float):
    image = ax.pcolormesh(np.arange(len(steps) + 1), np.arange(len(ranks) + 1) + 0.5, ranks,
                          cmap="YlGnBu", vmin=low, vmax=bound, rasterized=True)
    ax.set_ylim(len(ranks) + 0.5, 0.5)
    ticks = np.unique(np.linspace(0, len(steps) - 1, 3).round().astype(int))
    ax.set_xticks(ticks + 0.5, [f"{steps[t]:,}" for t in ticks])
    ax.set_yticks(range(1, len(ranks) + 1, 1 if len(ranks) <= 6 else 2))
    return image


def _mean_map(group) -> tuple[list[int], np.ndarray]:
    """Steps (T,) and the mean over seeds (layers, T)."""
    kept = [row["layers"] for row in group.rows if row["layers"]]
    steps = kept[0]["step"]
    same = [k for k in kept if k["step"] == steps]
    return steps, np.mean([np.array(k["effective_rank"]).T for k in same], axis=0)

"""The panels of the report picture: each function draws one on the matplotlib Axes it is given."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmlora_jax.report.verdict import bin_means, series
from rmlora_jax.tasks.scores import describe

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e3e6eb"
TRAIN, VALIDATION, TEST = "#2563a8", "#d9660a", "#111111"
KINDS = ("#6a3d9a", "#d0408f", "#1b9e77", "#7aa61e", "#a6611a", "#4d4d4d", "#17a2c4", "#e0a800",
         "#8c6bb1", "#e7298a", "#2c7fb8", "#66c2a4")
ORDER = ("query", "key", "value", "out", "intermediate", "fc1", "output", "fc2")
MOST_NAMES = 12  # names of module kinds that fit under the map
LEGEND_ROOM = 54  # characters above the effective ranks; a key takes about five beside its name


def loss_panel(ax, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any],
               unit: str = "nats per example") -> None:
    """Training loss (each line faint, smoothed in bold), validation loss, test loss."""
    steps, train = finite(*series(history, "train/loss"))
    eval_steps, validation = finite(*series(history, "eval/loss"))
    broken = first_broken(history)
    title = "Loss"
    if broken is not None:
        title += f": not finite from step {broken:,} on"
    elif validation.size:
        title += f": validation ended at {validation[-1]:.2f}, lowest {validation.min():.2f}"
    elif train.size:
        title += f": training ended at {bin_means(train, train, 20)[1][-1]:.2f}"
    _curves(ax, steps, train, eval_steps, validation)
    if validation.size:
        lowest = int(np.argmin(validation))
        ax.plot(eval_steps[lowest], validation[lowest], "o", ms=9, mfc="white", mew=2,
                color=VALIDATION, zorder=5, label="lowest")
    test = _test_points(ax, summary, "loss", ("test",))
    if broken is not None:
        ax.axvspan(broken, history[-1]["step"], color="#c0322b", alpha=0.08, lw=0)
    top = np.concatenate([smooth(train), validation, test, [1e-3]])
    start = train[0] if train.size else top.max()
    # A spike must not flatten everything else: show up to twice the loss at the start.
    ax.set_ylim(0, 1.06 * min(top.max(), 2 * max(start, *test, 1e-3)))
    finish(ax, title, "step", unit, last=history[-1]["step"])


def metric_panel(ax, history: Sequence[Mapping[str, float]], summary: Mapping[str, Any],
                 key: str = "accuracy") -> None:
    """A metric in training where it is measured there, on validation, and twice on test."""
    metric, _ = describe(key)
    steps, train = finite(*series(history, f"train/{key}"))
    eval_steps, validation = finite(*series(history, f"eval/{key}"))
    parts = []
    if train.size:
        parts.append(f"train {bin_means(train, train, 20)[1][-1]:.3f}")
    if validation.size:
        parts.append(f"validation {validation[-1]:.3f}")
    _curves(ax, steps, train, eval_steps, validation)
    test = _test_points(ax, summary, key, ("test, last step", "test, best step"))
    values = np.concatenate([train, validation, test, [0.05]])
    top, bottom = values.max(), min(values.min(), 0)
    if bottom < 0:
        ax.axhline(0, color=MUTED, lw=1.2)
    ax.set_ylim(1.2 * bottom, 1.02 if 0.7 < top <= 1 else 1.2 * top)
    title = metric.long[0].upper() + metric.long[1:]
    finish(ax, title + (f": {', '.join(parts)}" if parts else ""), "step", metric.axis,
            last=history[-1]["step"])


def singular_value_panel(ax, step: int, kinds: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Heat map: a row a layer, a block of columns a module kind, within it the singular values."""
    top = max(float(np.nanmax(k["singular_values"], initial=0)) for k in kinds.values())
    deepest = max(len(k["singular_values"]) for k in kinds.values())
    most = max(k["singular_values"].shape[1] for k in kinds.values())
    shown = _worth_showing([k["singular_values"] for k in kinds.values()], top)
    mesh = None
    for i, values in enumerate(kinds.values()):
        block = values["singular_values"][:, :shown]
        layers, rank = block.shape
        mesh = ax.pcolormesh(i + np.linspace(0.03, 0.97, rank + 1), np.arange(layers + 1) + 0.5,
                             block, cmap="YlGnBu", vmin=0, vmax=max(top, 1e-12), rasterized=True)
    ax.set_xlim(0, len(kinds))
    ax.set_ylim(deepest + 0.5, 0.5)
    names = list(kinds)
    fits = 80 // len(names) if len(names) <= MOST_NAMES else 0  # characters a block is wide
    ax.set_xticks(np.arange(len(names)) + 0.5, [shorten(name, fits) for name in names])
    ax.yaxis.get_major_locator().set_params(integer=True)
    if deepest <= 16:
        ax.set_yticks(np.arange(1, deepest + 1))
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.015, fraction=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=9.5, length=0)
    finish(ax, f"What moved: singular values of \u0394W, layer by layer, at step {step:,}", "",
            "layer", caption=_blocks_caption(shown, most))
    for i, label in enumerate(ax.get_xticklabels()):
        label.set(color=kind_colour(i), fontweight="bold", fontsize=11 if len(names) <= 8 else 9.5)
    ax.spines[["left", "bottom"]].set_visible(False)


def effective_rank_panel(ax, steps: Sequence[int],
                         records: Sequence[Mapping[str, Mapping[str, np.ndarray]]]) -> None:
    """Effective rank of every module kind over time: mean over the layers, and their spread."""
    names = list(records[-1])
    rank = max(k["singular_values"].shape[1] for k in records[-1].values())
    last = []
    for i, name in enumerate(names):
        centre, low, high = [], [], []
        for record in records:
            values = record[name]["effective_rank"] if name in record else np.array([])
            values = values[values >= 1 - 1e-3]  # a Delta W that is exactly 0 has no rank to show
            spread = values.std() if values.size else np.nan
            mean = values.mean() if values.size else np.nan
            centre.append(mean)
            low.append(mean - spread)
            high.append(mean + spread)
        colour = kind_colour(i)
        ax.fill_between(steps, low, np.minimum(high, rank), color=colour, alpha=0.10, lw=0)
        ax.plot(steps, centre, "-o" if len(steps) <= 25 else "-", color=colour, lw=2, ms=4,
                label=name)
        last.append(centre[-1])
    ax.axhline(rank, color=MUTED, lw=1.2, ls=(0, (4, 3)))
    ax.set_ylim(1 - 0.03 * rank, rank + 0.1 * rank)
    ax.annotate(f"rank {rank}: no more is possible", (0.985, rank), xytext=(0, 3),
                xycoords=ax.get_yaxis_transform(), textcoords="offset points", fontsize=9.5,
                color=MUTED, ha="right", va="bottom")
    last = np.array(last)[np.isfinite(last)]
    keyed = sum(len(name) + 5 for name in names) <= LEGEND_ROOM
    title = "Effective rank of \u0394W"
    if last.size:
        title += f": mean {last.mean():.1f} of {rank}"
    finish(ax, title, "step", "mean over layers; band \u00b1 1 s.d.",
            legend=keyed, columns=max(len(names), 1), last=steps[-1],
            caption="colours as of the names on the left"
            if not keyed and len(names) <= MOST_NAMES else "")


def facts_panel(ax, headline: tuple[str, str] | None, facts: Sequence[tuple[str, str]]) -> None:
    """A large figure with its caption, then names and values in two columns."""
    ax.set_axis_off()
    y = 1.19  # level with the other panels' titles
    if headline:
        ax.text(0, y, headline[0], fontsize=36, fontweight="bold", color=INK, va="top")
        ax.text(0, y - 0.18, headline[1], fontsize=11, color=MUTED, va="top")
        y -= 0.315
    gap = min(0.092, y / max(len(facts), 1))
    for name, value in facts:
        ax.text(0, y, name, fontsize=11, color=MUTED, va="top")
        ax.text(0.31, y, shorten(value, 36), fontsize=11, color=INK, va="top")
        y -= gap


def kind_colour(i: int) -> str:
    return KINDS[i % len(KINDS)]


def by_kind(modules: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Module paths gathered into kinds: singular_values (L, r), effective_rank (L,) of each.

    A stacked module is a kind by itself. Modules that differ only in their layer's number (a path
    component that is a number or ends in ``_number``) are the layers of one kind, by that number.
    A kind is named by the shortest end of its path that no other kind shares.
    """
    gathered = {}
    for path, values in modules.items():
        if not np.size(values.get("singular_values", ())):
            continue
        number = re.search(r"(?:^|/|_)(\d+)(?=/|$)", path)
        stacked = values["singular_values"].ndim > 1
        kind, layer = path, 0
        if number and not stacked:
            kind, layer = path[:number.start()] + path[number.end():], int(number[1])
        gathered.setdefault(kind.lstrip("/") or "module", []).append((layer, values))
    names = _short_names(list(gathered))
    return {names[kind]: _stack([v for _, v in sorted(gathered[kind], key=lambda entry: entry[0])])
            for kind in sorted(gathered, key=lambda k: (_place(k), k))}


def _stack(layers):
    rows = [row for v in layers
            for row in v["singular_values"].reshape(-1, v["singular_values"].shape[-1])]
    singular = np.full((len(rows), max(map(len, rows))), np.nan)  # nan: left white
    for target, row in zip(singular, rows, strict=True):
        target[: len(row)] = row
    ranks = np.concatenate([np.ravel(v.get("effective_rank", np.nan)) for v in layers])
    return {"singular_values": singular, "effective_rank": ranks}


def _place(kind: str) -> int:
    last = kind.rsplit("/", 1)[-1]
    return ORDER.index(last) if last in ORDER else len(ORDER)


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    def ends(path, n):
        return "/".join(path.split("/")[-n:])

    names = {}
    for path in paths:
        n = 1
        while n <= path.count("/") and sum(ends(p, n) == ends(path, n) for p in paths) > 1:
            n += 1
        names[path] = ends(path, n)
    return names


def first_broken(history: Sequence[Mapping[str, float]]) -> int | None:
    """The first step with a loss that is not a finite number."""
    steps = [row["step"] for row in history for key in ("train/loss", "eval/loss")
             if row.get(key) is not None and not np.isfinite(row[key])]
    return min(steps, default=None)


def _worth_showing(blocks: Sequence[np.ndarray], top: float) -> int:
    """How many singular values: all up to 16, of more those that reach 1 % of the largest."""
    most = max(b.shape[1] for b in blocks)
    reach = max((int((b >= 0.01 * top).any(0).sum()) for b in blocks), default=0)
    return min(most, max(reach, 16))


def _blocks_caption(shown: int, most: int) -> str:
    if most == 1:
        return "a block is one kind of module: its only singular value"
    count = f"{most}" if shown == most else f"largest {shown} of {most}"
    return f"a block is one kind of module: its {count} singular values from left to right"


def finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points whose y is a finite number."""
    return x[np.isfinite(y)], y[np.isfinite(y)]


def smooth(y: np.ndarray) -> np.ndarray:
    """Moving average over about a twentieth of the points.

    It is centred, and narrower near the start, where curves are steep; the end keeps its width.
    """
    half = max(len(y) // 40, 1) if len(y) >= 8 else 0
    return np.array([y[i - min(half, i): i + min(half, i) + 1].mean() for i in range(len(y))])


def shorten(text: str, most: int) -> str:
    """At most ``most`` characters, by leaving out the middle."""
    text = str(text)
    if len(text) <= most:
        return text
    if most < 2:
        return ""
    head = (most - 1) // 2
    return text[:head] + "\u2026" + text[len(text) - (most - 1 - head):]


def _curves(ax, steps, train, eval_steps, validation):
    if not train.size and not validation.size:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=MUTED,
                fontsize=11)
    if train.size:
        ax.plot(steps, train, color=TRAIN, lw=0.9, alpha=0.3)
        ax.plot(steps, smooth(train), color=TRAIN, lw=2.2, label="train")
    if validation.size:
        ax.plot(eval_steps, validation, "-o" if len(eval_steps) <= 40 else "-", ms=4.5, lw=2.2,
                color=VALIDATION, label="validation")


def _test_points(ax, summary, key, labels):
    last, best = summary.get("eval") or {}, summary.get("best_eval") or {}
    points = [(summary.get("steps"), last.get(key), TEST)]
    if best.get("step") != summary.get("steps"):
        points.append((best.get("step"), best.get(key), "white"))
    drawn = [(step, value, fill, label)
             for (step, value, fill), label in zip(points, labels, strict=False)
             if step is not None and value is not None]
    for step, value, fill, label in drawn:
        ax.plot(step, value, "D", ms=8, color=TEST, mfc=fill, mew=1.6, zorder=6, clip_on=False,
                label=label)
    return [value for _, value, _, _ in drawn]


def finish(ax, title, xlabel, ylabel, *, last=None, caption="", legend=True, columns=4):
    """Title, under it the legend or a caption, axes of one style; ``last``: the run's last step."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    handles = ax.get_legend_handles_labels()[0] if legend else []
    rows = max(-(-len(handles) // columns), 1)
    if caption:
        ax.annotate(caption, (0, 1), xytext=(0, 7), xycoords="axes fraction",
                    textcoords="offset points", fontsize=10, color=MUTED)
    ax.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=10 + 19 * rows)
    if handles:
        ax.legend(loc="lower left", bbox_to_anchor=(-0.015, 0.995), ncols=columns, frameon=False,
                  fontsize=10, handlelength=1.2, columnspacing=1.1, handletextpad=0.5,
                  borderaxespad=0.2, labelcolor=INK)
    ax.set_xlabel(xlabel, fontsize=10.5, color=MUTED)
    ax.set_ylabel(ylabel, fontsize=10.5, color=MUTED)
    ax.tick_params(colors=MUTED, labelsize=10, length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)
    if last is not None:
        ax.grid(color=GRID, lw=0.8)
        ax.set_axisbelow(True)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.set_xlim(-0.02 * last, 1.02 * max(last, 1))

"""Every seed a dot: the table as a picture, and the dimensions that updates reach."""

import statistics
from collections.abc import Sequence

from rmlora_jax.report.panels import INK, MUTED
from rmlora_jax.study import style
from rmlora_jax.study.tables import Group, groups, parameters, scale, spread, values

CAPTION = "small: one seed.  large: mean; bar: sample standard deviation over seeds."


def table_picture(rows: Sequence[dict], along: str = "method"):
    """A panel a task: for each method its seeds, mean and deviation, and what it trains."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(_name(group) for group in groups(rows)))
    room = 1.0 + 0.08 * max(map(len, names))  # inches for the names
    panel, figures = 3.3, 2.2  # for the dots, and beside them for numbers
    width, height = room + len(tasks) * (panel + figures), 1.3 + 0.46 * len(names)
    figure = style.new_figure(width, height)
    limits = {}  # by data set: two tasks of one data set have one axis
    for place, task in enumerate(tasks):
        left = room + place * (panel + figures)
        ax = figure.add_axes((left / width, 0.65 / height, panel / width, 1 - 1.25 / height))
        found = {_name(g): g for g in groups(rows) if g.task == task}
        metric = next(iter(found.values())).rows[0]["metric"]
        results = {name: [scale(metric) * v for v in values(group.rows, "test")]
                   for name, group in found.items()}
        data = next(iter(found.values())).rows[0]["dataset"]
        low, high = _limits(found, results)
        limits.setdefault(data, []).append((ax, low, high))
        for y, name in enumerate(names):
            if name not in found:
                continue
            group, numbers = found[name], results[name]
            tint = style.colour(group.method)
            if numbers and low <= statistics.mean(numbers) <= high:
                strip(ax, y, numbers, tint, along="x")
            elif numbers:  # far off: an arrow says on which side
                below = statistics.mean(numbers) < low
                inside = 0.02 * (high - low)
                ax.plot(low + inside if below else high - inside, y, "<" if below else ">", ms=7,
                        color=tint, zorder=5)
            count = style.thousands(parameters(group.rows)[0])
            right = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 10}
            ax.text(1.04, y, spread(numbers), color=INK, **right)
            ax.text(1.56, y, count or "head only", color=MUTED, ha="right",
                    **right)
        head = {"transform": ax.transAxes, "fontsize": 9, "color": MUTED, "va": "bottom"}
        ax.text(1.04, 1.02, "mean ± sd", **head)
        ax.text(1.56, 1.02, "trained", ha="right", **head)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_yticks(range(len(names)), names)
        style.finish(ax, task, f"test {style.axis(metric)}", grid="x")
        ax.tick_params(axis="y", labelsize=10.5, labelcolor=INK, labelleft=place == 0)
        ax.spines["left"].set_visible(False)
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
    tasks = ["all tasks"] if along == "task" else list(dict.fromkeys(r["task"] for r in rows))
    wide = any(row["trajectory"] for row in rows)
    columns = list(dict.fromkeys(_along(row, along) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panel = max(4.2, 0.95 * len(columns) + 0.8)
    xlabel = "" if along in ("method", "task") else style.short(along)
    figure = style.new_figure(panel * (1 + wide) + 1, 3.4 * len(tasks))
    axes = figure.subplots(len(tasks), 1 + wide, squeeze=False)
    for line, task in zip(axes, tasks, strict=True):
        here = [row for row in rows if along == "task" or row["task"] == task]
        _columns(line[0], here, along, columns, methods, lambda row: row["effective_rank"])
        _bounds(line[0], here, along, columns)
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
        _key(axes[0][-1], methods)
    figure.tight_layout(w_pad=2.5, h_pad=2)
    style.caption(figure, "Means over all modules and layers. One update ΔW = s A B has rank at "
                  "most r, dashed; what all its increments span may be larger.  " + CAPTION)
    return figure


def _bounds(ax, rows, along, columns):
    """Over each column a dash at the most that Delta W's rank could be."""
    for x, column in enumerate(columns):
        ranks = sorted({row["rank"] for row in rows if _along(row, along) == column})
        for rank in ranks:
            ax.plot([x - 0.32, x + 0.32], [rank, rank], color=MUTED, lw=1.4, ls=(0, (3, 2)))
            ax.annotate(f"r = {rank}", (x, rank), xytext=(0, 3), textcoords="offset points",
                        ha="center", fontsize=8.5, color=MUTED)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.1 * (high - low))


def _columns(ax, rows, along, columns, methods, value):
    """Strips of dots: x by ``along``, beside each other by method."""
    beside = 1 if along == "method" else len(methods)
    for x, column in enumerate(columns):
        for i, method in enumerate(methods):
            numbers = [value(r) for r in rows if r["method"] == method
                       and _along(r, along) == column]
            shift = 0 if beside == 1 else 0.6 * ((i + 0.5) / beside - 0.5)
            strip(ax, x + shift, numbers, style.colour(method, methods), along="y")
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_xticks(range(len(columns)), [style.shown(c) for c in columns])


def strip(ax, place, numbers, tint, *, along):
    """Mean and deviation at ``place``, every seed beside them; ``along``: the axis of values."""
    if not numbers:
        return
    beside = place + (0.24 if along == "x" else 0.09)

    def plot(first, second, *args, **kwargs):
        ax.plot(*((first, second) if along == "x" else (second, first)), *args, **kwargs)

    middle = statistics.mean(numbers)
    plot(numbers, [beside] * len(numbers), "o", ms=5, color=tint, alpha=0.4, mew=0, zorder=3)
    if len(numbers) > 1:
        reach = statistics.stdev(numbers)
        plot([middle - reach, middle + reach], [place, place], "-", lw=2.2, color=tint, zorder=4,
             solid_capstyle="round")
    plot([middle], [place], "o", ms=8, color=tint, mec="white", mew=1.2, zorder=5)


def _key(ax, methods):
    for method in methods:
        ax.plot([], [], "o", color=style.colour(method, methods), label=method)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=10,
              handletextpad=0.2)


def _along(row: dict, along: str):
    if along in ("method", "task"):
        return row[along]
    return row["settings"].get(along, row["variant"].get(along, "default"))


def _name(group: Group) -> str:
    return " ".join([group.method, *(f"{style.short(n)} {style.shown(v)}"
                                     for n, v in group.varied)])

"""How pictures and tables look: one style for report, study and bench."""

import io
import statistics
import textwrap
from collections.abc import Sequence

from rmlora_jax import methods

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e3e6eb"
TRAIN, VALIDATION, TEST = "#2563a8", "#d9660a", "#111111"
PALETTE = ("#6a3d9a", "#d0408f", "#1b9e77", "#7aa61e", "#a6611a", "#4d4d4d", "#17a2c4", "#e0a800",
           "#8c6bb1", "#e7298a", "#2c7fb8", "#66c2a4")
# Methods. Okabe & Ito 2008: every kind of colour vision tells these apart.
OWN = {
    "full": "#3b3b3b", "head": "#8f8f8f", "bitfit": "#b8a100", "lora": "#0072b2",
    "adalora": "#56b4e9", "sora": "#009e73", "reg_only": "#e69f00", "mask_only": "#cc79a7",
    "rm_lora": "#d55e00", "bottleneck": "#56b4e9", "prefix": "#009e73",
}
OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#3b3b3b", "#8f8f8f")


def colour(name: str, names: Sequence[str] = ()) -> str:
    """A method's colour, which is the same in all pictures. Any other name has one by its place
    among ``names``."""
    if name in OWN:
        return OWN[name]
    newer = [method for method in methods.METHODS if method not in OWN]
    if name in newer:
        return PALETTE[newer.index(name) % len(PALETTE)]
    place = names.index(name) if name in names else 0
    return OTHERS[place % len(OTHERS)]


def new_figure(width: float, height: float):
    """A matplotlib Figure on the Agg canvas, in inches, without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def png(figure, *, crop: bool = False) -> bytes:
    """The picture's file, 100 dots an inch; ``crop`` fits it to what is drawn, 120 dots an inch."""
    file = io.BytesIO()
    cropped = {"dpi": 120, "bbox_inches": "tight", "pad_inches": 0.2}
    figure.savefig(file, format="png", facecolor="white", metadata={"Software": None},
                   **(cropped if crop else {"dpi": 100}))
    return file.getvalue()


def finish(ax, title: str, xlabel: str = "", ylabel: str = "", *, grid: str = "y",
           large: bool = False, pad: float = 10) -> None:
    """Title at the left, quiet axes. ``grid``: the axis with lines; ``pad``: points below title."""
    heading, label, tick = (13, 10.5, 10) if large else (12, 10, 9.5)
    ax.set_title(title, loc="left", fontsize=heading, fontweight="bold", color=INK, pad=pad)
    ax.set_xlabel(xlabel, fontsize=label, color=MUTED)
    ax.set_ylabel(ylabel, fontsize=label, color=MUTED)
    ax.tick_params(colors=MUTED, labelsize=tick, length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)
    if grid:
        ax.grid(axis=grid, color=GRID, lw=0.8)
        ax.set_axisbelow(True)


def finish_panel(ax, title, xlabel, ylabel, *, last=None, grid="", caption="", legend=True,
                 columns=4) -> None:
    """`finish` of a large panel: a legend or a caption stands between its title and its axes.

    With ``last``, the run's last step, x counts the steps up to it.
    """
    from matplotlib.ticker import MaxNLocator

    handles = ax.get_legend_handles_labels()[0] if legend else []
    rows = max(-(-len(handles) // columns), 1)
    if caption:
        ax.annotate(caption, (0, 1), xytext=(0, 7), xycoords="axes fraction",
                    textcoords="offset points", fontsize=10, color=MUTED)
    if handles:
        ax.legend(loc="lower left", bbox_to_anchor=(-0.015, 0.995), ncols=columns, frameon=False,
                  fontsize=10, handlelength=1.2, columnspacing=1.1, handletextpad=0.5,
                  borderaxespad=0.2, labelcolor=INK)
    finish(ax, title, xlabel, ylabel, grid="both" if last is not None else grid, large=True,
           pad=10 + 19 * rows)
    if last is not None:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.set_xlim(-0.02 * last, 1.02 * max(last, 1))


def rows(ax, names: Sequence[str], tints: Sequence = (), size: float = 10.5) -> None:
    """Names in place of the y axis, the first at the top; ``tints`` make them the curves' key."""
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", labelsize=size, labelcolor=INK)
    for label, tint in zip(ax.get_yticklabels(), tints, strict=False):
        label.set(color=tint, fontweight="bold")
    ax.spines["left"].set_visible(False)


def key(ax, names: Sequence[str], marker: str, **where) -> None:
    """A legend of methods by their colours."""
    for name in names:
        ax.plot([], [], marker, color=colour(name, names), label=name)
    ax.legend(frameon=False, fontsize=10, **where)


def caption(figure, text: str) -> None:
    """Small text below the figure, wrapped to its width."""
    width, height = figure.get_size_inches()
    lines = textwrap.fill(text, int(14.5 * width))
    figure.text(0.1 / width, -0.12 / height, lines, fontsize=9, color=MUTED, va="top",
                linespacing=1.4)


def strip(ax, place: float, numbers: Sequence[float], tint: str, *, along: str) -> None:
    """Mean and sample deviation at ``place``, with a small dot for every number beside them, along
    the axis "x" or "y"."""
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


def shorten(text: str, most: int) -> str:
    """At most ``most`` characters, by leaving out the middle.

    >>> shorten("encoder", 5), shorten("query", 5)
    ('en…er', 'query')
    """
    if len(text) <= most:
        return text
    if most < 2:
        return ""
    head = (most - 1) // 2
    return text[:head] + "\u2026" + text[len(text) - (most - 1 - head):]


def text_table(lines: Sequence[Sequence[str]], names: int = 1) -> str:
    """Columns under each other: the first ``names`` to the left, figures to the right.

    >>> print(text_table([("step", "ms"), ("floor", "104"), ("lora", "9.5")]))
    step    ms
    floor  104
    lora   9.5
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(_aligned(line, widths, names)).rstrip() for line in lines)


def markdown_table(lines: Sequence[Sequence[str]], names: int = 1, *, aligned: bool = False) -> str:
    """The same as Markdown; ``aligned`` for those who read it as text.

    >>> print(markdown_table([("seed", "loss"), ("0", "1.250"), ("11", "0.5")], 0, aligned=True))
    | seed |  loss |
    | ---: | ----: |
    |    0 | 1.250 |
    |   11 |   0.5 |
    """
    head, *body = lines
    widths = [3] * len(head)
    if aligned:
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if i < names else "-" * (w - aligned) + ":" for i, w in enumerate(widths)]
    rows = [head, rule, *body]
    if aligned:
        rows = [_aligned(row, widths, names) for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _aligned(line: Sequence[str], widths: Sequence[int], names: int) -> list[str]:
    return [cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
